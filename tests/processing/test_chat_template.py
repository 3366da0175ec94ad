"""The chat template: the prompt of each kind of message, and chats with media through the processor."""

import base64
import http.server
import threading

import jinja2
import numpy as np
import pytest
import torch
from PIL import Image

from processing_minimax_m3 import load_chat_template

pytestmark = pytest.mark.compatibility

IDENTITY = (
    "Your model version is MiniMax-M3, developed by MiniMax. Knowledge cutoff: January 2026. Founded in early 2022, "
    "MiniMax is a global AI foundation model company committed to advancing the frontiers of AI towards AGI."
)
THINKING = (
    "\n\n<thinking_instructions>\nYou have a thinking capability that allows you to reason step by step before "
    "responding. When thinking is enabled, wrap your reasoning in <mm:think></mm:think> tags before your response. "
    "When thinking is disabled, begin your response directly after the </mm:think> prefix. When thinking is adaptive, "
    "decide on your own whether to think for the current turn.\nCurrent thinking mode: {mode}\n"
    "</thinking_instructions>"
)
MODES = {
    "adaptive": "adaptive. You are encouraged to think for complex decision-making, multi-step reasoning, or when "
    "analyzing function/tool results.",
    "enabled": "enabled. You MUST think step by step before every response, including after receiving function/tool "
    "results.",
    "disabled": "disabled. Do not output any thinking process.",
}
NS = "]<]minimax[>["


def head(mode="adaptive", root=IDENTITY, developer="You are a helpful assistant."):
    return f"]~!b[]~b]system\n{root}{THINKING.format(mode=MODES[mode])}[e~[\n]~b]developer\n{developer}[e~[\n"


@pytest.fixture
def render(processor):
    def render_chat(*messages, **options):
        return processor.apply_chat_template(list(messages), **options)

    return render_chat


USER = {"role": "user", "content": "Hello"}


def test_short_chat(render):
    assert render(USER) == head() + "]~b]user\nHello[e~[\n"
    assert render(USER, add_generation_prompt=True) == head() + "]~b]user\nHello[e~[\n]~b]ai\n"


@pytest.mark.parametrize(
    "mode, start", [("adaptive", ""), ("enabled", "<mm:think>"), ("disabled", "</mm:think>"), (None, "")]
)
def test_thinking_mode(mode, start, render):
    prompt = render(USER, add_generation_prompt=True, thinking_mode=mode)
    assert prompt == head(mode or "adaptive") + f"]~b]user\nHello[e~[\n]~b]ai\n{start}"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_leading_messages(role, render):
    instructions = {"role": role, "content": "Be brief."}
    assert render(instructions, USER).startswith(head(developer="Be brief."))
    root = {"role": "root", "content": [{"type": "text", "text": "ROOT"}]}
    assert render(root, instructions, USER).startswith(head(root="ROOT", developer="Be brief."))
    assert render(root, USER).startswith(head(root="ROOT"))
    assert render(USER, model_identity="You are M.").startswith(head(developer="You are M."))


def test_answers_and_their_reasoning(render):
    answers = [
        {"role": "assistant", "content": "plain"},
        {"role": "assistant", "content": "kept", "reasoning_content": "because"},
        {"role": "assistant", "content": "<mm:think>\nbecause\n</mm:think>\n\nsplit"},
        {"role": "assistant", "content": None},
    ]
    rendered = [render(USER, answer).removeprefix(head() + "]~b]user\nHello[e~[\n") for answer in answers]
    assert rendered == [
        "]~b]ai\n</mm:think>plain[e~[\n",
        "]~b]ai\n<mm:think>because</mm:think>kept[e~[\n",
        "]~b]ai\n<mm:think>because</mm:think>split[e~[\n",
        "]~b]ai\n</mm:think>[e~[\n",
    ]


def test_tools_calls_and_responses(render):
    tool = {"name": "search", "description": "Sucht etwas: ü", "parameters": {"type": "object", "properties": {}}}
    arguments = {
        "query": "a < b",
        "limit": 3,
        "exact": True,
        "unset": None,
        "filters": [{"key": "year", "values": [2025, 2026], "none": None}],
    }
    call = {"type": "function", "function": {"name": "search", "arguments": arguments}}
    prompt = render(
        USER,
        {"role": "assistant", "content": "Wait.", "tool_calls": [call, {"name": "stop", "arguments": {}}]},
        {"role": "tool", "content": "first"},
        {"role": "tool", "content": [{"type": "text", "text": "second "}, {"type": "image"}, {"output": 3}]},
        {"role": "assistant", "content": "Done."},
        tools=[{"type": "function", "function": tool}],
    )
    listed = '{"name": "search", "description": "Sucht etwas: ü", "parameters": {"type": "object", "properties": {}}}'
    assert prompt == (
        head(
            developer="You are a helpful assistant.\n\n# Tools\n"
            "You may call one or more tools to assist with the user query.\n"
            f"Here are the tools available in JSONSchema format:\n\n<tools>\n<tool>{listed}</tool>\n</tools>\n\n"
            f"To call tools, wrap all invocations in a single {NS}<tool_call>{NS}</tool_call> block. Parameter values "
            "containing nested objects or arrays are recursively expanded into XML elements. Example:\n\n"
            f"{NS}<tool_call>\n"
            f'{NS}<invoke name="tool-name-1">{NS}<param-1>value-1{NS}</param-1>{NS}<param-2>{NS}<item>'
            f"{NS}<key-a>val-a{NS}</key-a>{NS}<key-b>val-b{NS}</key-b>{NS}</item>{NS}</param-2>{NS}</invoke>\n"
            f'{NS}<invoke name="tool-name-2">{NS}<param-1>value-1{NS}</param-1>{NS}</invoke>\n'
            f"{NS}</tool_call>"
        )
        + "]~b]user\nHello[e~[\n"
        + f"]~b]ai\n</mm:think>Wait.{NS}<tool_call>\n"
        + f'{NS}<invoke name="search">{NS}<query>a < b{NS}</query>{NS}<limit>3{NS}</limit>{NS}<exact>true{NS}</exact>'
        + f"{NS}<filters>{NS}<item>{NS}<key>year{NS}</key>{NS}<values>{NS}<item>2025{NS}</item>{NS}<item>2026{NS}</item>"
        + f"{NS}</values>{NS}</item>{NS}</filters>{NS}</invoke>\n"
        + f'{NS}<invoke name="stop">{NS}</invoke>\n{NS}</tool_call>[e~[\n'
        + "]~b]tool\n<response>first</response>\n<response>second ]<]image[>[3</response>[e~[\n"
        + "]~b]ai\n</mm:think>Done.[e~[\n"
    )


def test_tool_from_a_function(render):
    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The one.
            b: The other.
        """
        return a + b

    assert '<tool>{"name": "add", "description": "Add two numbers."' in render(USER, tools=[add])


def test_placeholders_keep_their_place(render):
    parts = [
        {"type": "text", "text": " one "},
        {"type": "image"},
        "two",
        {"type": "video"},
        {"type": "image_url", "image_url": {"url": "x.png"}},
        {"type": "video_url", "video_url": {"url": "x.mp4"}},
    ]
    expected = "]~b]user\n one ]<]image[>[two]<]video[>[]<]image[>[]<]video[>[[e~[\n"
    assert render({"role": "user", "content": parts}) == head() + expected


CALL = {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    "messages, options, message",
    [
        ([USER, {"role": "system", "content": "late"}], {}, "role 'system' must come first .*message 1"),
        ([{"role": "root", "content": "x"}, USER, {"role": "root", "content": "x"}], {}, "'root' must .*message 2"),
        ([{"role": "narrator", "content": "x"}], {}, 'role must be one of .* got "narrator" .message 0'),
        ([USER, {"content": "x"}], {}, "role must be one of .*message 1"),
        ([USER, {"role": 5, "content": "x"}], {}, 'role must be one of .* got "5" .message 1'),
        ([USER, {"role": "tool", "content": "x"}], {}, "must follow an assistant message with tool_calls .message 1"),
        ([{"role": "user", "content": [{"type": "audio"}]}], {}, "part must be .* got {'type': 'audio'} .message 0"),
        ([{"role": "user", "content": {"type": "text"}}], {}, "content must be a string .*message 0"),
        ([{"role": "root", "content": "x"}, {"role": "system", "content": 5}], {}, "content must .* got 5 .message 1"),
        ([USER, {"role": "user", "content": [5]}], {}, "a content part must be .* got 5 .message 1"),
        ([USER, {"role": "user"}], {}, "role 'user' must have content, .*message 1"),
        ([{"role": "system", "content": None}, USER], {}, "role 'system' must have content, .*message 0"),
        ([USER], {"thinking_mode": "sometimes"}, 'thinking_mode must be .* got "sometimes"'),
        ([USER], {"thinking_mode": ["enabled"]}, "thinking_mode must be .* got"),
        ([USER], {"model_identity": 5}, "model_identity must be a string, got 5"),
        ([{"role": "assistant", "tool_calls": "x"}], {}, "tool_calls must be a list, got x .message 0"),
        ([{"role": "assistant", "tool_calls": ["x"]}], {}, "tool_calls.0. must be a mapping with a name, got x"),
        ([{"role": "assistant", "tool_calls": [CALL, {"arguments": {}}]}], {}, "tool_calls.1. must .*message 0"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}], {}, "tool_calls.0. must .* a name"),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]}],
            {},
            "the arguments of tool call 'f' must be a mapping .*message 0",
        ),
        ([USER], {"tools": [{}]}, "tools.0. must be a mapping with a name, got {}"),
        ([USER], {"tools": [CALL, {"function": {"name": ["f"]}}]}, "tools.1. must be a mapping with a name"),
    ],
)
def test_chat_that_the_template_refuses(messages, options, message, tokenizer):
    """The template refuses it by itself, without the processor's checks, as in serving engines."""
    with pytest.raises(jinja2.TemplateError, match=message):
        tokenizer.apply_chat_template(messages, chat_template=load_chat_template(), tokenize=False, **options)


def test_none_as_identity_is_the_default(render):
    assert render(USER, model_identity=None) == render(USER)


def test_template_needs_no_extension_of_ours(processor, tokenizer):
    """A tokenizer alone also renders the template, as serving engines do."""
    assert tokenizer.apply_chat_template([USER], chat_template=load_chat_template(), tokenize=False) == (
        processor.apply_chat_template([USER])
    )


def test_assistant_mask_covers_what_the_model_writes(processor, pixels):
    chat = [
        {"role": "user", "content": [{"type": "image", "image": pixels(56, 84, 3)}, {"type": "text", "text": "Look"}]},
        {"role": "assistant", "content": "A cat.", "reasoning_content": "Fur."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    output = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    written = output["input_ids"][output["assistant_masks"].bool()]
    expected = "<mm:think>Fur.</mm:think>A cat.[e~[</mm:think>Yes.[e~["
    assert processor.tokenizer.decode(written) == expected
    assert output["assistant_masks"].shape == output["input_ids"].shape


@pytest.mark.parametrize("mode", ["adaptive", "enabled", "disabled"])
@pytest.mark.parametrize("reasoning", ["Fur.", ""])
def test_assistant_mask_leaves_out_what_the_generation_prompt_holds(mode, reasoning, processor):
    """In each mode, the learned tokens are those behind the prompt of `generate`, if the answer fits the mode."""
    question, answer = USER, {"role": "assistant", "content": "A cat.", "reasoning_content": reasoning}
    options = {"tokenize": True, "return_dict": True, "thinking_mode": mode}
    prompt = processor.apply_chat_template([question], add_generation_prompt=True, **options)["input_ids"][0]
    chat = processor.apply_chat_template([question, answer], return_assistant_tokens_mask=True, **options)
    ids, mask = chat["input_ids"][0], chat["assistant_masks"][0]
    written = [token for token, is_written in zip(ids, mask) if is_written]
    if mode == ("disabled" if reasoning else "enabled"):  # an answer that the mode forbids keeps its tags
        assert written == processor.tokenizer(f"<mm:think>{reasoning}</mm:think>A cat.[e~[" if reasoning else "</mm:think>A cat.[e~[")["input_ids"]  # fmt: skip
    else:
        assert ids[: len(prompt)] == prompt
        assert mask[: len(prompt)] == [0] * len(prompt)
        assert written == ids[len(prompt) : -1]  # the last token is the newline between turns


@pytest.fixture(scope="module")
def web_address(image_files, video_file):
    """A web server on this machine with the test images and the test video."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            files = {f"/{file.name}": file for file in [*image_files.values(), video_file]}
            if self.path not in files:
                self.send_error(404)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(files[self.path].read_bytes())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def image_parts(image_files, web_address) -> dict[str, dict]:
    file = image_files["png"]
    image = Image.open(file)
    encoded = base64.b64encode(file.read_bytes()).decode()
    return {
        "pil": {"type": "image", "image": image},
        "numpy": {"type": "image", "image": np.array(image)},
        "tensor": {"type": "image", "image": torch.from_numpy(np.array(image)).permute(2, 0, 1)},
        "path": {"type": "image", "path": str(file)},
        "pathlib": {"type": "image", "path": file},
        "file-address": {"type": "image", "url": file.as_uri()},
        "web-address": {"type": "image", "url": f"{web_address}/{file.name}"},
        "base64": {"type": "image", "base64": encoded},
        "data-address": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
    }


def test_chat_with_images_of_any_kind(image_files, web_address, processor):
    outputs = {
        name: processor.apply_chat_template(
            [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        for name, part in image_parts(image_files, web_address).items()
    }
    expected = outputs.pop("pil")
    assert expected["input_ids"].eq(processor.image_token_id).sum() == expected["image_grid_thw"].prod() // 4
    for name, output in outputs.items():
        for key in expected:
            assert output[key].equal(expected[key]), (name, key)


def test_chat_with_videos_of_any_kind(video_file, image_files, web_address, pixels, processor):
    frames = [Image.fromarray(frame) for frame in pixels(4, 56, 84, 3)]
    parts = {
        "path": {"type": "video", "path": str(video_file)},
        "pathlib": {"type": "video", "video": video_file},
        "file-address": {"type": "video", "url": video_file.as_uri()},
        "web-address": {"type": "video", "url": f"{web_address}/{video_file.name}"},
        "openai": {"type": "video_url", "video_url": {"url": f"{web_address}/{video_file.name}"}},
        "pil-frames": {"type": "video", "video": frames},
        "array": {"type": "video", "video": pixels(4, 56, 84, 3)},
        "frame-files": {"type": "video", "video": [str(image_files["png"])] * 3},
    }
    grids = {}
    for name, part in parts.items():
        kwargs = {"fps": 2} if name not in ("pil-frames", "array", "frame-files") else {}
        output = processor.apply_chat_template(
            [{"role": "user", "content": [part]}], tokenize=True, return_dict=True, processor_kwargs=kwargs
        )
        grids[name] = output["video_grid_thw"].tolist()
        text = processor.tokenizer.decode(output["input_ids"][0])
        assert ("]<]1.0 seconds[>[" in text) == bool(kwargs), name
    assert all(grids[name] == [[3, 4, 6]] for name in ("path", "pathlib", "file-address", "web-address", "openai"))
    assert grids["pil-frames"] == grids["array"] == grids["frame-files"] == [[2, 4, 6]]


def test_batch_of_chats(image_files, pixels, processor):
    chats = [
        [{"role": "user", "content": "Only words."}],
        [
            {
                "role": "user",
                "content": [
                    {"type": "video", "video": pixels(2, 56, 56, 3)},
                    {"type": "image", "path": str(image_files["png"])},
                    {"type": "text", "text": "Both"},
                ],
            }
        ],
        [{"role": "user", "content": [{"type": "image", "image": pixels(60, 60, 3)}]}],
    ]
    together = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, processor_kwargs={"return_mm_token_type_ids": True}
    )
    for index, chat in enumerate(chats):
        alone = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
        assert alone["input_ids"][0] == together["input_ids"][index]
    assert len(together["image_grid_thw"]) == 2 and len(together["video_grid_thw"]) == 1
    assert max(together["mm_token_type_ids"][0]) == 0


def test_lost_web_address(web_address, processor):
    for part, message in (
        ({"type": "image", "url": f"{web_address}/none.png"}, "the image '.*none.png' cannot be read"),
        ({"type": "video", "url": f"{web_address}/none.mp4"}, r"`videos\[0\]` \('.*none.mp4'\) cannot be decoded"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template([{"role": "user", "content": [part]}], tokenize=True, return_dict=True)


def test_placeholder_without_an_image(processor):
    with pytest.raises(ValueError, match="Found 1 .* but no images were passed .*'url', 'path' or 'image'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=True)
