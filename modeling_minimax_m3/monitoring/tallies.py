"""What the passes of a model are counted by: hooks that add to sums on the device and never wait for it."""

import math
import re
from typing import Any, cast

import torch
from torch import nn

from configuration_minimax_m3 import MiniMaxM3VLTextConfig

from ..layers.attention import MiniMaxM3VLAttention
from ..layers.moe import MiniMaxM3VLTopKRouter
from ..models.pretrained import MiniMaxM3VLPreTrainedModel
from ..runtime.layout_building import real_tokens
from ..training.language_loss import batch_share
from .pass_flops import PassFlops, token_positions
from .selected_mass import selected_mass

LAYER = re.compile(r"\blayers\.(\d+)\.")
LOSSES = ("language_loss", "balance_loss", "indexer_loss")
COUNTS = ("tokens", "learned", "flops", "passes")
IGNORED = -100


def layer_number(name: str) -> int:
    """The number of the decoder layer in the name of a module."""
    found = LAYER.search(name)
    return int(found[1]) if found else 0


class PassTallies:
    """Sums over the passes of a model, training and evaluation apart.

    Args:
        model (nn.Module): The model, alone or inside of wrappers such as PEFT's.

    Attributes:
        wants_mass (bool): Whether the next pass with labels also measures the selected share of the attention.
        is_averaged (int): Processes over whose tokens the losses of a pass were averaged. Their mean is a loss then.

    Raises:
        ValueError: There is no MiniMax-M3 in it.
    """

    def __init__(self, model: nn.Module):
        found = (module for module in model.modules() if isinstance(module, MiniMaxM3VLPreTrainedModel))
        head = next(found, None)
        if head is None:
            raise ValueError(f"the run must train a MiniMax-M3, got {type(model).__name__}")
        self.wants_mass = False
        self.is_averaged = 1
        self._config = cast(MiniMaxM3VLTextConfig, head.config.get_text_config())
        sizes = [(number_of_values(parameter), parameter.requires_grad) for parameter in model.parameters()]
        trained = sum(size for size, is_trained in sizes if is_trained)
        self._flops = PassFlops(self._config, trained / max(sum(size for size, _ in sizes), 1))
        self.sums: dict[bool, dict[str, torch.Tensor]] = {True: {}, False: {}}
        self.experts: dict[int, torch.Tensor] = {}
        self._mode: bool | None = None  # of the pass that runs: training, evaluation, or nothing that counts
        self._real: torch.Tensor | None = None
        self._inputs: dict[str, Any] = {}
        self._handles = [
            head.register_forward_pre_hook(self._begin, with_kwargs=True),
            head.register_forward_hook(self._end),
        ]
        self._attention: list[tuple[int, MiniMaxM3VLAttention]] = []
        self._routers: list[int] = []
        for name, module in head.named_modules():
            if isinstance(module, MiniMaxM3VLTopKRouter):
                # before the hooks of expert parallelism, which replace the ids of other devices' experts
                number = layer_number(name)
                self._routers.append(number)
                hook = self._make_router_hook(number)
                self._handles.append(module.register_forward_hook(hook, prepend=True))
            elif isinstance(module, MiniMaxM3VLAttention) and module.selector is not None:
                self._attention.append((layer_number(name), module))

    @property
    def sparse_layers(self) -> list[int]:
        """The numbers of the layers that attend to selected blocks."""
        return [number for number, _ in self._attention]

    @property
    def expert_layers(self) -> list[int]:
        """The numbers of the layers with routed experts."""
        return sorted(set(self._routers))

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer."""
        return self._config.num_local_experts

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._observe(None)

    def read(self, names: list[str], is_training: bool, device: torch.device) -> list[float]:
        """The sums of these names over all processes, 0 where nothing was added, and forgets them.

        All processes have to call it with the same names. It waits for the device once.
        """
        dtype = torch.float32 if device.type == "mps" else torch.float64
        sums = self.sums[is_training]
        parts = [sums[name].detach().to(device, dtype) if name in sums else torch.zeros((), dtype=dtype, device=device) for name in names]  # fmt: skip
        self.sums[is_training] = {}
        return _sum_over_processes(torch.stack(parts)).tolist()

    def read_experts(self, device: torch.device) -> dict[int, list[float]]:
        """The choices of each expert since the last call, over all processes, by the number of the layer."""
        layers = self.expert_layers
        if not layers:
            return {}
        zeros = torch.zeros(self.num_experts, dtype=torch.int64, device=device)
        counts = torch.stack([self.experts[number].to(device) if number in self.experts else zeros for number in layers])  # fmt: skip
        self.experts = {}
        return dict(zip(layers, _sum_over_processes(counts).tolist()))

    # ---- hooks ------------------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        is_training = model.training and torch.is_grad_enabled()
        has_labels = inputs.get("labels") is not None
        self._mode = True if is_training else False if has_labels and not model.training else None
        if self._mode is None:
            return
        ids = inputs.get("input_ids")
        ids = args[0] if ids is None and args else ids
        states = inputs.get("inputs_embeds") if ids is None else ids
        if states is None:
            self._mode = None
            return
        self._inputs = {name: inputs.get(name) for name in ("labels", "num_items_in_batch", "shift_labels")}
        shape = (int(states.shape[0]), int(states.shape[1]))
        mask, offsets = inputs.get("attention_mask"), inputs.get("cu_seq_lens_q")
        self._real = real_tokens(mask, offsets, *shape)
        if self._mode:
            with torch.no_grad():
                self._count_tokens(shape, states.device, mask, inputs.get("position_ids"), offsets)
        if self.wants_mass and has_labels:
            self.wants_mass = False
            self._observe(self._add_mass)

    def _count_tokens(
        self, shape: tuple[int, int], device: torch.device, mask: Any, position_ids: Any, offsets: Any
    ) -> None:
        labels = self._inputs["labels"]
        all_tokens = torch.full((), shape[0] * shape[1], device=device)
        tokens = all_tokens if self._real is None else self._real.sum()
        learned: torch.Tensor | int = 0 if labels is None else (labels[:, 1:] != IGNORED).sum()
        positions = token_positions(shape, device, mask, position_ids, offsets)
        self._add("tokens", tokens)
        if labels is not None:
            self._add("learned", torch.as_tensor(learned))
        self._add("flops", self._flops(positions, self._real, learned))

    def _end(self, model: nn.Module, args: tuple, outputs: Any) -> None:
        mode, self._mode = self._mode, None
        self._observe(None)
        if mode is None:
            return
        get = outputs.get if isinstance(outputs, dict) else lambda name: getattr(outputs, name, None)
        loss, balance, indexer = (get(name) for name in ("loss", "aux_loss", "indexer_loss"))
        self._add("passes", torch.tensor(1.0), mode)
        num_items = self._inputs["num_items_in_batch"]
        # Losses that were divided by a whole batch's tokens are parts of a sum. All others are means.
        factor = self.is_averaged if num_items is not None else 1
        with torch.no_grad():
            if balance is not None:
                self._add("balance_loss", balance.detach().float(), mode)
            if indexer is not None:
                self._add("indexer_loss", indexer.detach().float() * factor, mode)
            if loss is not None and loss.dim() == 0:
                language = loss.detach().float()
                if balance is not None:
                    share = batch_share(device=loss.device, **self._inputs)
                    language = language - self._config.router_aux_loss_coef * balance.to(loss.device) * share
                if indexer is not None:
                    language = language - self._config.indexer_loss_coef * indexer.to(loss.device)
                # Inductor drops a product with 1. It then returns the loss itself, and takes the gradient from it.
                self._add("language_loss", language if factor == 1 else language * factor, mode)
                if num_items is not None:
                    self._add("summed", torch.tensor(1.0), mode)
        self._inputs, self._real = {}, None

    def _make_router_hook(self, number: int):
        def count(router: nn.Module, args: tuple, outputs: tuple[torch.Tensor, ...]) -> None:
            if not self._mode:
                return
            chosen = outputs[2].detach()
            ones = torch.ones_like(chosen, dtype=torch.int64)
            if self._real is not None and self._real.numel() == chosen.shape[0]:
                ones = ones * self._real.flatten()[:, None].to(chosen.device)
            if number not in self.experts:
                self.experts[number] = torch.zeros(self.num_experts, dtype=torch.int64, device=chosen.device)
            self.experts[number].scatter_add_(0, chosen.flatten().long(), ones.flatten())

        return count

    def _observe(self, observer: Any) -> None:
        for _, module in self._attention:
            if observer is not None:
                module.selection_observer = observer
            else:
                module.__dict__.pop("selection_observer", None)

    @torch.no_grad()
    def _add_mass(self, layer: MiniMaxM3VLAttention, query: Any, key: Any, blocks: Any, layout: Any) -> None:
        if layout.is_cached or layout.allowed is not None or self._mode is None:
            return
        real = None if self._real is None else layout.order_queries(self._real.to(query.device))
        size = self._config.index_block_size
        mass, _, count = selected_mass(query, key, blocks, layout, real, size, layer.scaling)
        self._add(f"mass_{layer.layer_idx}", mass, self._mode)
        self._add(f"mass_count_{layer.layer_idx}", count, self._mode)

    def _add(self, name: str, value: torch.Tensor, is_training: bool = True) -> None:
        sums = self.sums[is_training]
        value = value.detach()
        sums[name] = sums[name] + value.to(sums[name].device) if name in sums else value


def number_of_values(parameter: nn.Parameter) -> int:
    """Values of a whole parameter, also where ZeRO-3 has left none of them in it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def expert_load(counts: list[float]) -> dict[str, float]:
    """How evenly the experts of a layer are used.

    Returns:
        `entropy`, of the shares of the experts, divided by its greatest value, so from 0 (one expert does it all) to 1
        (all do the same); and the shares of the `most_used` and the `least_used` expert. Empty if nothing was counted.
    """
    total = sum(counts)
    if not total:
        return {}
    shares = [count / total for count in counts]
    entropy = -sum(share * math.log(share) for share in shares if share)
    greatest = math.log(len(shares)) if len(shares) > 1 else 1.0
    return {"entropy": entropy / greatest, "most_used": max(shares), "least_used": min(shares)}
