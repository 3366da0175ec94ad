"""The examples of a model card: each continues from the code that loads the model, and the tests run all of them."""

from collections.abc import Mapping

# What an example may expect: `processor` and `model`, as `loading` names them, and files photo.png and clip.mp4.
_ANSWER = """
inputs = processor.apply_chat_template(
    messages,
    thinking_mode="disabled",
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""

_TEXT = (
    """
text = "The number of the calm needle is 658. The number of the red lamp is 214. What is the number of the red lamp?"
messages = [{"role": "user", "content": text}]
"""
    + _ANSWER
)

_MEDIUM = (
    """
content = [{"type": "TYPE", "path": "FILE"}, {"type": "text", "text": "QUESTION"}]
messages = [{"role": "user", "content": content}]
"""
    + _ANSWER
)

_BATCH = """
conversations = [
    [{"role": "user", "content": "Ada has 12 apples. Ada buys 7. How many apples are left?"}],
    [{"role": "user", "content": "The secret meeting is in Rome at 9 o'clock. In which city is the secret meeting?"}],
]
inputs = processor.apply_chat_template(
    conversations,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
    processor_kwargs={"padding": True, "padding_side": "left"},
).to(model.device)
output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
for prompt, answer in zip(inputs["input_ids"], output[:, inputs["input_ids"].shape[1] :]):
    print(processor.parse_response(answer, prefix=prompt)["content"])
"""

_TOOLS = """
weather = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a day.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "day": {"type": "string"}},
            "required": ["city", "day"],
        },
    },
}
messages = [{"role": "user", "content": "How will the weather be in Bonn on Monday?"}]
inputs = processor.apply_chat_template(
    messages, tools=[weather], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
answer = output[0, inputs["input_ids"].shape[1] :]
message = processor.parse_response(answer, prefix=inputs["input_ids"][0], tools=[weather])
for call in message.get("tool_calls", []):
    print(call["function"]["name"], call["function"]["arguments"])
"""

_THINKING = """
messages = [{"role": "user", "content": "Ada has 12 apples. Ada buys 7. How many apples are left?"}]
inputs = processor.apply_chat_template(
    messages,
    thinking_mode="enabled",
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
message = processor.parse_response(output[0, inputs["input_ids"].shape[1] :], prefix=inputs["input_ids"][0])
print(message.get("reasoning_content"))
print(message["content"])
"""

_LONG = """
text = "The grass is green. The sky is blue. " * 200 + "The number of the calm needle is 658. " + "Here we go. " * 200
messages = [{"role": "user", "content": text + "What is the number of the calm needle?"}]
inputs = processor.apply_chat_template(
    messages,
    thinking_mode="disabled",
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
output = model.generate(**inputs, max_new_tokens=16, do_sample=False, prefill_chunk_size=1024)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""

_PIPELINE = """
from transformers import pipeline

chat = pipeline("image-text-to-text", model=model, processor=processor)
content = [{"type": "image", "path": "photo.png"}, {"type": "text", "text": "How many objects are there?"}]
options = {"max_new_tokens": 32, "do_sample": False}
print(chat([{"role": "user", "content": content}], generate_kwargs=options)[0]["generated_text"][-1]["content"])
"""

_LORA = """
import torch
from peft import LoraConfig, get_peft_model

adapted = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
adapted.train()
optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-3)
batch = processor.tokenizer(["Sparse attention reads few blocks."], return_tensors="pt").to(model.device)
loss = adapted(**batch, labels=batch["input_ids"], use_cache=False).loss
loss.backward()
optimizer.step()
adapted.save_pretrained("adapter")
"""

_QUANTIZED = """
from transformers import AutoModelForImageTextToText

from modeling_minimax_m3 import mxfp8_config

model = AutoModelForImageTextToText.from_pretrained(
    CHECKPOINT, dtype="auto", device_map="auto", quantization_config=mxfp8_config()
)
"""


def _medium(kind: str, file: str, question: str) -> str:
    return _MEDIUM.replace("TYPE", kind).replace("FILE", file).replace("QUESTION", question)


def loading(checkpoint: str, adapter: str | None = None) -> str:
    """Python that loads the processor and the model of a checkpoint with pictures, with an adapter or without."""
    peft, apply = "", ""
    if adapter is not None:
        peft, apply = "from peft import PeftModel\n", f"\nmodel = PeftModel.from_pretrained(model, {_quoted(adapter)})"
    return (
        f"{peft}from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        "import modeling_minimax_m3  # registers the classes\n\n"
        f"processor = AutoProcessor.from_pretrained({_quoted(checkpoint)})\n"
        f"model = AutoModelForImageTextToText.from_pretrained({_quoted(checkpoint)}, "
        f'dtype="auto", device_map="auto"){apply}'
    )


def _quoted(text: str) -> str:
    """A Python string in double quotes where that is possible."""
    plain = repr(text)
    return f'"{plain[1:-1]}"' if '"' not in text and plain[0] == "'" else plain


def examples_of(checkpoint: str, is_adapter: bool = False) -> Mapping[str, str]:
    """Examples by heading, for a checkpoint that reads images and videos. Each continues from `loading`.

    Args:
        checkpoint (str): Name or folder of the checkpoint. Its processor and, for an adapter, its weights are loaded.
        is_adapter (bool): Whether `model` carries an adapter. Then there are no examples that add or quantize one.
    """
    examples = {
        "Text": _TEXT,
        "Image": _medium("image", "photo.png", "How many objects are there?"),
        "Video": _medium("video", "clip.mp4", "What moves?"),
        "Several conversations at once": _BATCH,
        "Tool calls": _TOOLS,
        "Thinking": _THINKING,
        "Long text": _LONG,
    }
    if not is_adapter:
        quantized = _QUANTIZED.replace("CHECKPOINT", _quoted(checkpoint))
        examples |= {"Pipeline": _PIPELINE, "LoRA": _LORA, "Quantized loading": quantized}
    return {heading: code.strip("\n").replace("\n\n\n", "\n\n") for heading, code in examples.items()}
