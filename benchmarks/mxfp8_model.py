"""A whole model in MXFP8 beside the same one in bf16, on one GPU: `python -m benchmarks.mxfp8_model [--output PATH]`.

Layers of the released geometry as in `model_step`: "4 layers" are one dense and three sparse, "7 layers" one and six.
Experts, shared expert, dense MLP and the projections of attention and indexer are in MXFP8, as in the released model;
head, embedding and router stay in bf16. A model is measured in bf16, then its weights are quantized in place, and it is
measured again.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from modeling_minimax_m3.layers.mxfp8 import Mxfp8Experts, Mxfp8Linear, Mxfp8Module
from modeling_minimax_m3.mxfp8 import quantize_mxfp8

from . import model_step_workloads as workloads
from .gpu import Run, parse_arguments
from .implementations import OURS
from .report import as_table

MODELS = ("4 layers", "7 layers")
FORMS = ("bf16", "MXFP8")
WORKS: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "decode step in a CUDA graph, 8k cached": (workloads.graph_step, {"past": 8192}),
    "prefill, 8k": (workloads.one_pass, {"new": 8192}),
    "prefill, 32k": (workloads.one_pass, {"new": 32768}),
}


@torch.no_grad()
def quantize(model: Any) -> None:
    """Puts layers with MXFP8 weights in place of the linear layers and experts of the decoder layers."""
    for layer in model.model.layers:
        for name, module in list(layer.named_modules()):
            if type(module) is nn.Linear:
                replacement: Mxfp8Module = Mxfp8Linear(module.in_features, module.out_features, False, torch.bfloat16)
            elif name == "mlp.experts":
                with torch.device("meta"):
                    replacement = Mxfp8Experts(module, torch.bfloat16)
            else:
                continue
            for weight_name in replacement.weight_names:
                values, scales = quantize_mxfp8(module._parameters.pop(weight_name))
                for stored_name, tensor in ((weight_name, values), (f"{weight_name}_scale_inv", scales)):
                    replacement.register_parameter(stored_name, nn.Parameter(tensor, requires_grad=False))
            layer.set_submodule(name, replacement.eval())


def bytes_of_a_step(model: Any) -> int:
    """Bytes of the weights that one token uses: of the embedding one row, of the experts the chosen ones."""
    total = 0
    for name, parameter in model.named_parameters():
        share = 1.0
        if "mlp.experts." in name:
            share = model.config.num_experts_per_tok / model.config.num_local_experts
        elif "embed_tokens" in name:
            share = 1 / parameter.shape[0]
        total += round(parameter.nbytes * share)
    return total


def tables(record: dict) -> str:
    found = {(row["model"], row["work"], row["form"]): row for row in record["rows"]}
    rows = []
    for model in MODELS:
        for work in WORKS:
            plain, quantized = (found.get((model, work, form)) for form in FORMS)
            if plain and quantized:
                ratios = [quantized["ms"] / plain["ms"], quantized["step_bytes"] / plain["step_bytes"]]
                figures = [f"{plain['ms']:.3g}", f"{quantized['ms']:.3g}", *(f"{ratio:.2f}" for ratio in ratios)]
                rows.append([work, model, *figures])
    step = next(iter(WORKS))
    if all((model, step, form) in found for model in MODELS for form in FORMS):
        steps = [[found[model, step, form] for form in FORMS] for model in MODELS]
        layers = [(steps[1][i]["ms"] - steps[0][i]["ms"]) / 3 for i in range(2)]
        sizes = [(steps[1][i]["step_bytes"] - steps[0][i]["step_bytes"]) / 3 for i in range(2)]
        figures = [*(f"{ms:.3f}" for ms in layers), f"{layers[1] / layers[0]:.2f}", f"{sizes[1] / sizes[0]:.2f}"]
        rows.append(["one sparse layer of a step: a third of the difference", "", *figures])
    head = ["", "model", "bf16, ms", "MXFP8, ms", "MXFP8 / bf16", "bytes of a token's weights, MXFP8 / bf16"]
    return as_table(head, rows)


def main() -> None:
    run = Run("mxfp8_model", parse_arguments("mxfp8_model", "Time a model in MXFP8 beside bf16."), tables)
    rows = run.record["rows"] = []

    @cache
    def model_of(name: str) -> Any:
        torch.cuda.empty_cache()
        return workloads.build(OURS, name)

    def case(model_name: str, form: str, work: str) -> None:
        model = model_of(model_name)
        if form == "MXFP8" and not any(isinstance(module, Mxfp8Module) for module in model.modules()):
            quantize(model)
            torch.cuda.empty_cache()
        measure, sizes = WORKS[work]
        figures = measure(model, workloads.Case("mxfp8", model_name, work, measure, **sizes))
        size = sum(parameter.nbytes for parameter in model.parameters())
        setting = {"model": model_name, "form": form, "work": work}
        rows.append(setting | figures | {"bytes": size, "step_bytes": bytes_of_a_step(model)})
        if (form, work) == (FORMS[-1], list(WORKS)[-1]):
            model_of.cache_clear()

    run.cases([(model, form, work) for model in MODELS for form in FORMS for work in WORKS], case)
    run.finish()


if __name__ == "__main__":
    main()
