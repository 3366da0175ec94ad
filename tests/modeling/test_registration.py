"""Importing our package makes Auto classes and pipelines return our classes. Stock's own go on working."""

import importlib
import json

import pytest
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist

import modeling_minimax_m3
from configuration_minimax_m3 import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, MiniMaxM3VLVisionConfig, tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM

from ..forked_processes import run_python

pytestmark = pytest.mark.compatibility

COMPOSITE_CLASSES = {
    "AutoConfig": "configuration_minimax_m3.MiniMaxM3VLConfig",
    "AutoModel": "modeling_minimax_m3.MiniMaxM3VLModel",
    "AutoModelForCausalLM": "modeling_minimax_m3.MiniMaxM3SparseForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_minimax_m3.MiniMaxM3SparseForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_minimax_m3.MiniMaxM3SparseForConditionalGeneration",
    "AutoProcessor": "processing_minimax_m3.MiniMaxM3VLProcessor",
    "AutoImageProcessor": "processing_minimax_m3.MiniMaxM3VLImageProcessor",
    "AutoVideoProcessor": "processing_minimax_m3.MiniMaxM3VLVideoProcessor",
}


def resolve(path: str) -> type:
    package, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(package), name)


@pytest.mark.parametrize(("auto_class", "ours"), COMPOSITE_CLASSES.items())
def test_auto_classes(tiny_checkpoint, auto_class, ours):
    loaded = getattr(transformers, auto_class).from_pretrained(tiny_checkpoint)
    assert type(loaded) is resolve(ours)


@pytest.mark.parametrize(
    ("part", "auto_class", "ours"),
    [
        ("text_config", AutoModel, "MiniMaxM3VLTextModel"),
        ("text_config", AutoModelForCausalLM, "MiniMaxM3VLForCausalLM"),
        ("vision_config", AutoModel, "MiniMaxM3VLVisionModel"),
    ],
)
def test_auto_classes_of_the_parts(tmp_path, part, auto_class, ours):
    config = getattr(tiny_config(), part)
    auto_class.from_config(config).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(config)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is getattr(modeling_minimax_m3, ours)


@pytest.mark.parametrize("config_class", [MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, MiniMaxM3VLVisionConfig])
def test_model_types_give_our_configs(config_class):
    assert type(AutoConfig.for_model(config_class.model_type)) is config_class


def test_files_that_stock_saved_give_our_classes(stock, to_stock_config, tiny_checkpoint, tmp_path):
    stock_processor = transformers.MiniMaxM3VLProcessor.from_pretrained(tiny_checkpoint)
    stock_processor.save_pretrained(tmp_path)
    stock.MiniMaxM3SparseForConditionalGeneration(to_stock_config(tiny_config())).save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is resolve(COMPOSITE_CLASSES["AutoProcessor"])
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is MiniMaxM3SparseForConditionalGeneration


def test_stock_classes_asked_for_by_name_stay_stock(stock, to_stock_config, tiny_checkpoint):
    config = transformers.MiniMaxM3VLConfig.from_pretrained(tiny_checkpoint)
    assert type(config).__module__.startswith("transformers.")
    model = stock.MiniMaxM3SparseForConditionalGeneration.from_pretrained(tiny_checkpoint)
    assert type(model.config) is type(config)
    assert type(AutoModelForImageTextToText.from_config(config)) is type(model)
    processor = transformers.MiniMaxM3VLProcessor.from_pretrained(tiny_checkpoint)
    assert type(processor).__module__.startswith("transformers.")


def conversion_rules() -> list[tuple]:
    """The registered rules with their operations, which their own text leaves out."""
    return [
        (
            type(rule),
            rule.source_patterns,
            rule.target_patterns,
            [(type(operation), vars(operation)) for operation in getattr(rule, "operations", [])],
        )
        for rule in get_checkpoint_conversion_mapping("minimax_m3_vl")
    ]


def test_fused_projections_are_concatenated_whole_and_experts_one_by_one():
    """Transformers' own operation would give the rows of a sharded weight in another order."""
    operations = {
        target: [operation for operation, _ in operations]
        for _, _, targets, operations in conversion_rules()
        for target in targets
        if "gate_up_proj" in target
    }
    experts = [target for target in operations if "experts" in target and "shared" not in target]
    fused = operations.keys() - set(experts)
    assert len(experts) == 1 and fused
    for target in fused:
        (operation,) = operations[target]
        assert operation is not Concatenate and issubclass(operation, Concatenate), target
    merge, concatenate = operations[experts[0]]  # which differ in their copies and in their reverse
    assert issubclass(merge, MergeModulelist) and issubclass(concatenate, Concatenate)


def test_registering_again_changes_nothing(tiny_checkpoint):
    before = conversion_rules()
    modeling_minimax_m3.register()
    assert conversion_rules() == before
    assert type(AutoProcessor.from_pretrained(tiny_checkpoint)) is resolve(COMPOSITE_CLASSES["AutoProcessor"])


def test_image_text_to_text_pipeline(tiny_checkpoint):
    chat = transformers.pipeline("image-text-to-text", model=str(tiny_checkpoint), device="cpu")
    assert type(chat.model) is MiniMaxM3SparseForConditionalGeneration
    assert type(chat.processor) is resolve(COMPOSITE_CLASSES["AutoProcessor"])
    image = Image.new("RGB", (56, 84), (200, 30, 30))
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]}
    ]
    answer = chat(messages, max_new_tokens=5, do_sample=False)[0]["generated_text"][-1]
    inputs = chat.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = chat.model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == chat.processor.parse_response(tokens, prefix=inputs["input_ids"][0])
    assert answer["role"] == "assistant"
    assert answer["content"] == chat.processor.decode(tokens).removesuffix(chat.tokenizer.eos_token)


def test_text_generation_pipeline(tiny_checkpoint, tmp_path):
    config = tiny_config().text_config
    MiniMaxM3VLForCausalLM(config).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tiny_checkpoint).tokenizer.save_pretrained(tmp_path)
    generator = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert type(generator.model) is MiniMaxM3VLForCausalLM
    assert generator("Once upon", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("Once upon")


IMPORT_ORDERS = {
    "stock alone": "",
    "ours first": "import modeling_minimax_m3; from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl",
    "stock first": "from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl; import modeling_minimax_m3",
}
GENERATE = """
import json, sys, torch
{imports}
torch.set_num_threads(1)
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as stock
models = {{"stock": stock.MiniMaxM3SparseForConditionalGeneration.from_pretrained(sys.argv[1])}}
if "modeling_minimax_m3" in sys.modules:
    from transformers import AutoModelForImageTextToText
    models["ours"] = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
    assert type(models["ours"]).__module__ == "modeling_minimax_m3.models.multimodal"
ids = torch.arange(1, 121)[None] * 7 % 400
options = {{
    "dynamic": {{}},
    "static": {{"cache_implementation": "static", "disable_compile": True}},
    "beams": {{"num_beams": 3}},
    "lookup": {{"prompt_lookup_num_tokens": 3}},
}}
print(json.dumps({{
    name: {{
        way: model.generate(ids, max_new_tokens=12, do_sample=False, **kwargs)[0, 120:].tolist()
        for way, kwargs in options.items()
    }}
    for name, model in models.items()
}}))
"""


@pytest.mark.slow
def test_stock_works_beside_ours_in_both_import_orders(make_pair, tmp_path):
    """A process with stock alone gives the expected output. No process has a GPU or a compiler."""
    make_pair(MiniMaxM3SparseForConditionalGeneration, tiny_config())[0].save_pretrained(tmp_path)
    outputs = {}
    for order, imports in IMPORT_ORDERS.items():
        done = run_python("-c", GENERATE.format(imports=imports), str(tmp_path), folder=tmp_path, PATH="")
        assert done.returncode == 0, f"{order}:\n{done.stderr}"
        outputs[order] = json.loads(done.stdout.splitlines()[-1])

    right = outputs["stock alone"]["stock"]
    assert len({tuple(tokens) for tokens in right.values()}) == 2  # beams differ from greedy
    for order in ("ours first", "stock first"):
        assert outputs[order]["stock"] == right, order
        assert outputs[order]["ours"] == right, order
