"""Decoding through a CUDA graph: `generate` captures the pass of one new token once, and replays it for each token.

The GPU finishes such a pass sooner than Python launches its kernels, so without a graph the GPU waits. Nothing is
compiled. The pass reads and writes the memory of the cache that `generate` holds: a dynamic cache lends the buffers
that it has in reserve, and the graph is captured again when they are full.

What a graph cannot take runs as it does without this module, and a debug message names the reason once. The
environment variable MINIMAX_M3_CUDA_GRAPHS=0 switches graphs off.
"""

import gc
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput, logging

from ..fused.support import is_idle_recorder
from .cache import MiniMaxM3VLDynamicLayer, MiniMaxM3VLStaticLayer
from .expert_cache import is_offloaded
from .gathered_weights import gathers_weights
from .graph_pieces import GraphPieces
from .layout_building import build_layout
from .transformers_versions import output_fields, takes_cache

logger = logging.get_logger(__name__)

# Inputs of a pass that change from token to token. All others must stay as they are.
_CHANGING = {"input_ids", "position_ids", "attention_mask", "cache", "mm_token_type_ids"}

_DEVICE_TYPE = "cuda"

_streams: dict[torch.device, torch.cuda.Stream] = {}
_stream_lock = threading.Lock()  # two threads must not capture on one stream

# Memory that no graph uses now, for the next capture: PyTorch would keep that of a deleted graph until the card is full.
# A graph that nobody replays holds it. It must not be a captured pass, because one with collectives has to end before
# the processes part.
_idle_memory: dict[torch.device, list[GraphPieces]] = {}


def obstacle_of_model(model: PreTrainedModel) -> str | None:
    """Why no graph can hold a pass of `model`; None where one can. Looks at what `generate` does not change."""
    if os.environ.get("MINIMAX_M3_CUDA_GRAPHS") == "0":
        return "MINIMAX_M3_CUDA_GRAPHS is 0"
    if model.device.type != _DEVICE_TYPE:
        return f"the model is on {model.device}"
    if model.training:
        return "the model is in training mode"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return f"{type(quantizer).__name__} says that its layers cannot be captured"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    if getattr(model, "_pp_forward_wrapped", False):
        return "the layers are stages of a pipeline"
    if gathers_weights(model):
        return "each pass gathers weights from all processes"
    obstacle = _obstacle_of_plan(model)
    if obstacle is not None:
        return obstacle
    device = model.device
    for name, module in model.named_modules():
        # Experts on the host are copied between two pieces of the graph.
        tensors = () if is_offloaded(module) else (*module._parameters.items(), *module._buffers.items())
        for tensor_name, tensor in tensors:
            if isinstance(tensor, DTensor) and not _is_part_of_plan(model, tensor):
                return f"`{name}.{tensor_name}` is spread over several processes"
            if tensor is not None and tensor.device != device:
                return f"`{name}.{tensor_name}` is on {tensor.device}, other weights are on {device}"
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not all(is_idle_recorder(hook) for hook in hooks):
            return f"`{name or type(module).__name__}` has forward hooks, which a replay would not call"
    return None


def _obstacle_of_plan(model: PreTrainedModel) -> str | None:
    """Why no graph can hold what processes exchange by the plan by which Transformers spread `model` over them.

    All processes have the same inputs then, so they capture the same pass, with its collectives.
    """
    plan = getattr(model.config, "distributed_config", None)
    if plan is None or not (plan.ep_size or 1) > 1:
        return None
    how = getattr(plan, "ep_implementation", "auto")
    # Transformers sums the outputs of the experts where all their processes have the same tokens.
    if how not in ("auto", "all_reduce") or plan.ep_size != plan.tp_size:
        return "the processes exchange tokens, and the host reads how many"
    return None


def _is_part_of_plan(model: PreTrainedModel, tensor: DTensor) -> bool:
    """Whether Transformers spread `tensor` over processes of GPUs, whose collectives a graph can hold."""
    has_plan = getattr(model.config, "distributed_config", None) is not None
    groups = tensor.device_mesh.get_all_groups()
    return has_plan and all(torch.distributed.get_backend(group) == "nccl" for group in groups)


def obstacle_of_cache(cache: Any) -> str | None:
    """Why no graph can use `cache`; None where one can. A cache that no pass has used yet counts as usable."""
    if not isinstance(cache, Cache):
        return "there is no cache"
    if getattr(cache, "offloading", False):
        return "the cache is offloaded"
    return None


def _obstacle_of_inputs(model: PreTrainedModel, inputs: dict[str, Any]) -> str | None:
    tokens, cache, mask = inputs.get("input_ids"), inputs.get("cache"), inputs.get("attention_mask")
    if tokens is None or tokens.shape[1] != 1:
        return "the pass reads more than one token of a row, or embeddings"
    obstacle = obstacle_of_cache(cache)
    if obstacle is not None or cache is None:
        return obstacle
    for layer in cache.layers:
        if not isinstance(layer, (MiniMaxM3VLDynamicLayer, MiniMaxM3VLStaticLayer)) or not layer.is_initialized:
            return f"the cache has a {type(layer).__name__}, or holds no tokens"
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        return "`attention_mask` has another form than (B, S)"
    if torch.is_grad_enabled():
        return "gradients are on"
    if torch.cuda.is_current_stream_capturing():
        return "the caller captures a graph"
    if any(isinstance(value, torch.Tensor) for name, value in inputs.items() if name not in _CHANGING):
        return "there are inputs beside tokens, positions, mask and cache"
    config = model.config.get_text_config()
    names = ("output_attentions", "output_hidden_states", "output_router_logits")
    if any(inputs.get(name) or getattr(config, name, False) for name in names):
        return "the pass returns more than logits"
    return None


class CapturedDecoding:
    """What `generate` calls in place of the model. There is one for each `generate`, which frees the graph at its end.

    Args:
        model: A model with a language modeling head.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._pass: _CapturedPass | None = None
        self._failed = False
        self._told: set[str] = set()

    def _tell(self, obstacle: str) -> None:
        if obstacle not in self._told:
            self._told.add(obstacle)
            logger.debug(f"Decoding steps run without a CUDA graph: {obstacle}")

    @takes_cache
    def __call__(self, **inputs: Any) -> ModelOutput:
        """Call `model(**inputs)`. The next pass overwrites the logits of this one."""
        obstacle = "an earlier capture failed" if self._failed else _obstacle_of_inputs(self._model, inputs)
        if obstacle is not None:
            self._pass = None
            self._tell(obstacle)
            return self._model(**inputs)
        if self._pass is None or not self._pass.continues_with(inputs):
            self._pass = None  # frees its memory before the next one takes some
            self._pass = _CapturedPass.of(self._model, inputs)
            if self._pass is None:
                self._tell("padding lies between the tokens of a row")
                return self._model(**inputs)
        try:
            return self._pass.run(inputs)
        except _CaptureFailed as error:
            self._tell(f"the capture failed with {type(error.__cause__).__name__}: {error.__cause__}")
            self._pass, self._failed = None, True
            return self._model(**inputs)
        except BaseException:
            self._pass = None  # a part of it may have run, and counted the token
            raise


class _CaptureFailed(Exception):
    """A pass does what no graph can hold. Nothing of it has run."""


class _CapturedPass:
    """A pass of one new token over the memory of a cache.

    It runs twice in Python: once as usual, which lets libraries make their preparations, and once to be captured. Then
    the GPU replays it. The inputs of a replay are copied into the tensors that the graph reads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        cache_seqlens: torch.Tensor,
        cache_leftpad: torch.Tensor | None,
    ):
        self._model, self._cache = model, inputs["cache"]
        self._memory = [_LayerMemory(layer) for layer in self._cache.layers]
        self._graph_cache = Cache(layers=[memory.static_layer for memory in self._memory])
        self._counter = self._share_counter()
        # The values of the last pass, because each pass first counts its own token.
        self._seqlens, self._leftpad = cache_seqlens - 1, cache_leftpad
        self._tokens = inputs["input_ids"].clone()
        positions = inputs.get("position_ids")
        self._positions = None if positions is None else positions.clone()
        self._constants = _constants(inputs)
        self._graph: GraphPieces | None = None
        self._is_prepared = False
        self._output_class: type[ModelOutput] = ModelOutput
        self._logits: torch.Tensor | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, inputs: dict[str, Any]) -> "_CapturedPass | None":
        """None where padding lies between a row's tokens: then each pass moves all keys."""
        tokens, cache = inputs["input_ids"], inputs["cache"]
        layout = build_layout(
            inputs.get("attention_mask"), None, cache, tokens.shape[0], tokens.shape[1], tokens.device
        )
        if layout.key_order is not None:
            return None
        assert layout.cache_seqlens is not None  # the cache holds tokens
        return cls(model, inputs, layout.cache_seqlens, layout.cache_leftpad)

    def _share_counter(self) -> torch.Tensor | None:
        """Makes the layers that we lend memory to read one counter of tokens, which a pass then raises once."""
        layers = [memory.static_layer for memory in self._memory if memory.can_grow]
        if len(layers) < len(self._memory) or len({memory.length for memory in self._memory}) > 1:
            return None
        for layer in layers:
            layer.cumulative_length, layer.counts_tokens = layers[0].cumulative_length, False
        return layers[0].cumulative_length

    def continues_with(self, inputs: dict[str, Any]) -> bool:
        """Whether `inputs` are those of the next token of the same rows, and the cache is as this pass left it."""
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        return (
            inputs["cache"] is self._cache
            and inputs["input_ids"].shape == self._tokens.shape
            and _shape(positions) == _shape(self._positions)
            and (mask is None or mask.shape[1] == self._memory[0].length + 1)
            and _constants(inputs) == self._constants
            and len(self._cache.layers) == len(self._memory)
            and all(memory.is_unchanged(layer) for memory, layer in zip(self._memory, self._cache.layers))
            and (self._memory[0].has_room or not self._memory[0].can_grow)
        )

    def run(self, inputs: dict[str, Any]) -> ModelOutput:
        """The pass over `inputs`, which this pass was made for or continues with.

        Raises:
            ValueError: A static cache is full.
        """
        self._memory[0].static_layer.check_room(self._memory[0].length + 1)
        self._tokens.copy_(inputs["input_ids"])
        if self._positions is not None:
            self._positions.copy_(inputs["position_ids"])
        if self._graph is None and self._is_prepared:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._on_side_stream(self._forward)
            self._is_prepared = True
        for memory in self._memory:
            memory.count_token(was_replayed=self._graph is not None)
        return self._output_class(**output_fields(logits=self._logits, cache=self._cache))

    def _forward(self) -> None:
        self._seqlens.add_(1)
        rows = {"cache_seqlens": self._seqlens, "cache_leftpad": self._leftpad}
        outputs = self._model(
            input_ids=self._tokens,
            position_ids=self._positions,
            attention_mask=rows,
            cache=self._graph_cache,
            **self._constants,
        )
        if self._counter is not None:
            self._counter.add_(1)
        self._output_class, self._logits = type(outputs), outputs.logits

    def _capture(self) -> None:
        graph = GraphPieces()
        idle = _idle_memory.setdefault(self._tokens.device, [])
        holder = idle.pop() if idle else None

        def capture() -> None:
            nonlocal holder
            if holder is None:
                new = GraphPieces()
                new.capture(lambda: torch.zeros(1, device=self._tokens.device))
                holder = new
            graph.capture(self._forward, holder.pool())

        # The collector might free another graph meanwhile, which ends the capture with an error.
        collects_garbage = gc.isenabled()
        gc.disable()
        try:
            self._on_side_stream(capture)
        except Exception as error:
            raise _CaptureFailed from error
        finally:
            if collects_garbage:
                gc.enable()
            if holder is not None:
                weakref.finalize(self, idle.append, holder).atexit = False
        self._graph = graph
        for memory in self._memory:
            memory.note_version()

    def _on_side_stream(self, function: Callable[[], None]) -> None:
        # Capturing is not possible on the default stream. One stream serves all, as cuBLAS keeps memory for each.
        device = self._tokens.device
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)
        stream, caller = _streams[device], torch.cuda.current_stream(device)
        with _stream_lock:
            stream.wait_stream(caller)
            try:
                with torch.cuda.stream(stream):
                    function()
            finally:  # after an error too, because the caller may free memory that is in use here
                caller.wait_stream(stream)


class _LayerMemory:
    """The memory of one layer of a cache, as a static layer writes it."""

    def __init__(self, layer: MiniMaxM3VLDynamicLayer | MiniMaxM3VLStaticLayer):
        self._layer = layer
        self.length = int(layer.get_seq_length())
        self._buffers = layer.buffers() if isinstance(layer, MiniMaxM3VLDynamicLayer) else []
        self.static_layer = layer.as_static_layer(room=1) if isinstance(layer, MiniMaxM3VLDynamicLayer) else layer
        self._tensors = [buffer.data for buffer in self._buffers] or [layer.keys, layer.values]
        self.note_version()

    @property
    def can_grow(self) -> bool:
        return bool(self._buffers)

    @property
    def has_room(self) -> bool:
        return self.length < self.static_layer.max_cache_len

    def note_version(self) -> None:
        """Note that we changed the static layer's counter ourselves. A replay does not change its version."""
        self._version = self._current_version()

    def _current_version(self) -> int:
        counter: torch.Tensor = self.static_layer.cumulative_length
        return 0 if counter.is_inference() else counter._version  # `torch.inference_mode` counts no versions

    def is_unchanged(self, layer: MiniMaxM3VLDynamicLayer | MiniMaxM3VLStaticLayer) -> bool:
        """Whether `layer` is this one, and nobody else moved it or added or removed tokens."""
        if layer is not self._layer:
            return False
        if self._buffers:
            return layer.get_seq_length() == self.length and all(
                buffer.data is data for buffer, data in zip(self._buffers, self._tensors)
            )
        is_same_memory = layer.keys is self._tensors[0] and layer.values is self._tensors[1]
        return is_same_memory and self._current_version() == self._version

    def count_token(self, was_replayed: bool) -> None:
        self.length += 1
        for buffer in self._buffers:
            buffer.length += 1
        if not was_replayed:
            self.note_version()


def _shape(tensor: torch.Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _constants(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in _CHANGING}
