"""The control tokens of MiniMax-M3's tokenizer, by name and by their ids in the released vocabulary.

The released vocabulary is a byte-level BPE of 200000 entries, followed by these tokens. The embedding has 200064 rows,
and the last few are unused. Processors take ids from their tokenizer and not from this module, so a small tokenizer
with the same token strings works as well.
"""

BEGIN_OF_DOCUMENT_TOKEN = "]~!b["
BEGIN_OF_TURN_TOKEN = "]~b]"
END_OF_TURN_TOKEN = "[e~["
UNKNOWN_TOKEN = "]!d~["
IMAGE_TOKEN = "]<]image[>["
VIDEO_TOKEN = "]<]video[>["
VISION_START_TOKEN = "]<]start of image[>["
VISION_END_TOKEN = "]<]end of image[>["
THINK_START_TOKEN = "<mm:think>"
THINK_END_TOKEN = "</mm:think>"
NAMESPACE_TOKEN = "]<]minimax[>["
TOOL_CALL_START_TOKEN = "<tool_call>"
TOOL_CALL_END_TOKEN = "</tool_call>"

FIRST_SPECIAL_TOKEN_ID = 200_000

SPECIAL_TOKENS: tuple[str, ...] = (
    "]!p~[",
    "<fim_prefix>",
    "<fim_middle>",
    "<fim_suffix>",
    "<fim_pad>",
    "<reponame>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<empty_output>",
    "<commit_before>",
    "<commit_msg>",
    "<commit_after>",
    BEGIN_OF_TURN_TOKEN,
    END_OF_TURN_TOKEN,
    UNKNOWN_TOKEN,
    "<function_call>",
    "<code_interpreter>",
    "]<]speech[>[",
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    "]<]start of speech[>[",
    "]<]end of speech[>[",
    VISION_START_TOKEN,
    VISION_END_TOKEN,
    "]<]start of video[>[",
    "]<]end of video[>[",
    "]<]vision pad[>[",
    BEGIN_OF_DOCUMENT_TOKEN,
    "<jupyter_error>",
    "<add_file>",
    "<delete_file>",
    "<rename_file>",
    "<edit_file>",
    "<commit_message>",
    "<empty_source_file>",
    "<repo_struct>",
    "<code_context>",
    "<file_content>",
    "<source_files>",
    "<pr_start>",
    "<review_comment>",
    "<filepath>",
    "<file_sep>",
    "<think>",
    "</think>",
    TOOL_CALL_START_TOKEN,
    TOOL_CALL_END_TOKEN,
    "]<]frame[>[",
    "]<]start of frame[>[",
    "]<]end of frame[>[",
    "<|content_altered_placeholder|>",
    NAMESPACE_TOKEN,
    THINK_START_TOKEN,
    THINK_END_TOKEN,
)
"""In the order of their ids: token i has id `FIRST_SPECIAL_TOKEN_ID + i` in the released vocabulary."""

# Markup that parsers of reasoning and tool calls look for in the generated text. A tokenizer should know these strings
# as single tokens, but keep them with `skip_special_tokens=True`.
TEXT_MARKUP_TOKENS: tuple[str, ...] = (
    "<think>",
    "</think>",
    TOOL_CALL_START_TOKEN,
    TOOL_CALL_END_TOKEN,
    NAMESPACE_TOKEN,
    THINK_START_TOKEN,
    THINK_END_TOKEN,
)
