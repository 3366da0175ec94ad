"""Text, images and videos together: from prompts with placeholders to model inputs."""

import copy
from collections.abc import Callable
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.video_utils import VideoInput

from configuration_minimax_m3.auto_class import AutoClassByImport

from .control_tokens import Walls
from .media import flatten_images, flatten_videos, is_frame_list, map_sources
from .messages import check_text, is_list, normalize_conversations, normalize_tools
from .response_spelling import knows_markers
from .response_template import add_response_template
from .special_tokens import IMAGE_TOKEN, VIDEO_TOKEN, VISION_END_TOKEN, VISION_START_TOKEN


class MiniMaxM3VLProcessor(AutoClassByImport, ProcessorMixin):
    """Tokenizer, image processor and video processor in one call.

    Each image placeholder `]<]image[>[` and video placeholder `]<]video[>[` in the text is repeated, once for each
    feature that the model computes: one per merged patch, between a start and an end token. A video has one such
    bracket per temporal patch. If the timing is known, the time of its first frame stands before the bracket (`]<]1.5
    seconds[>[`). Files have frame times of their own. An array has them with `video_metadata` that holds `fps` and
    `frames_indices`.

    Images and videos belong to the placeholders in order. If they come as one list per text, their number must fit
    each text. If they come as a flat list, their number must fit all texts together.

    Raises:
        ValueError: A text is missing or empty, the numbers of placeholders and media differ, truncation would cut an
            image or a video, or one of the two media processors refuses an input.
    """

    IMAGE_TOKEN = IMAGE_TOKEN
    VIDEO_TOKEN = VIDEO_TOKEN
    VISION_START_TOKEN = VISION_START_TOKEN
    VISION_END_TOKEN = VISION_END_TOKEN

    # Frames that fit the patch grid stay as they are. The video processor resizes the others by its own rule.
    videos_kwargs = {"do_resize": False, "return_metadata": True}

    def __init__(self, image_processor=None, tokenizer=None, video_processor=None, chat_template=None, **kwargs):
        self.image_token = self.IMAGE_TOKEN
        self.video_token = self.VIDEO_TOKEN
        self.vision_start_token = self.VISION_START_TOKEN
        self.vision_end_token = self.VISION_END_TOKEN
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template, **kwargs)
        self.image_token_id = self._token_id(self.IMAGE_TOKEN)
        self.video_token_id = self._token_id(self.VIDEO_TOKEN)
        self.vision_start_token_id = self._token_id(self.VISION_START_TOKEN)
        self.vision_end_token_id = self._token_id(self.VISION_END_TOKEN)
        if knows_markers(self.tokenizer):
            add_response_template(self.tokenizer)

    def _token_id(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or self.tokenizer.convert_ids_to_tokens(token_id) != token:
            raise ValueError(f"`tokenizer` must know {token!r} as one token; this is not a MiniMax-M3 tokenizer.")
        return token_id

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs, including `mm_token_type_ids`.

        Those of the tokenizer come first, because `Trainer` takes the length of the first one for a row's length.
        """
        others = [name for name in super().model_input_names if name not in self.tokenizer.model_input_names]
        return [*self.tokenizer.model_input_names, *others, "mm_token_type_ids"]

    @property
    def unused_input_names(self) -> list[str]:
        """Names of the video processor's outputs that only this class uses, and no model."""
        return ["num_chunks_per_video"]

    def prepare_inputs_layout(
        self,
        images: ImageInput | None = None,
        text: Any = None,
        videos: VideoInput | None = None,
        audio=None,
        **kwargs,
    ):
        """Prepares the inputs as Transformers does. Empty lists, which data collators pass, count as no media."""
        if text is not None and not isinstance(text, (str, list, tuple)):
            raise ValueError(f"`text` must be a string or a list of strings, got {type(text).__name__}.")
        if is_list(images) and not flatten_images(map_sources(images)):
            images = None
        videos = map_sources(videos)
        if is_list(videos) and not flatten_videos(videos):
            videos = None
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(
        self,
        images: ImageInput | None = None,
        text: Any = None,
        videos: VideoInput | None = None,
        audio=None,
        **kwargs,
    ) -> None:
        """Checks texts and counts before anything is decoded or resized. The class docstring lists the errors."""
        if kwargs.get("sanitize_control_tokens"):
            raise ValueError(
                "`sanitize_control_tokens` is an option of `apply_chat_template`: a finished `text` does not say "
                "which control tokens a user typed. Pass messages to `apply_chat_template` instead."
            )
        if "audios" in kwargs:
            raise ValueError("`audios` is not an argument: MiniMax-M3 takes text, images and videos.")
        if text is None:
            if images is None and videos is None:
                raise ValueError("at least one of `text`, `images` and `videos` must be given, got none of them.")
            return
        if not text:
            raise ValueError("`text` must hold at least one prompt, got an empty list.")
        for index, sample in enumerate(text):
            if not isinstance(sample, str) or not sample:
                raise ValueError(f"`text[{index}]` must be a string that is not empty, got {sample!r:.100}.")
            check_text(sample, f"`text[{index}]`")
        self._check_counts("images", self.image_token, text, images, flatten_images, is_list)
        # a list of frames is one video
        self._check_counts(
            "videos",
            self.video_token,
            text,
            videos,
            flatten_videos,
            lambda item: is_list(item) and not is_frame_list(item),
        )

    @staticmethod
    def _check_counts(
        name: str,
        token: str,
        text: list[str],
        media: Any,
        flatten: Callable[[Any], list],
        is_list_of_a_text: Callable[[Any], bool],
    ) -> None:
        wanted = [sample.count(token) for sample in text]
        given = 0 if media is None else len(flatten(media))
        # They begin as the messages of Transformers do, because other programs look for them.
        if media is None and sum(wanted):
            raise ValueError(
                f"Found {sum(wanted)} {token} tokens in the text but no {name} were passed (tokens per text: {wanted}). "
                f"If they come from a chat, each {name.removesuffix('s')} part must hold its source as 'url', 'path' or "
                f"'{name.removesuffix('s')}'."
            )
        if sum(wanted) != given:
            raise ValueError(
                f"The total number of {token} tokens in the prompts should be the same as the number of {name} passed. "
                f"Found total {sum(wanted)} {token} tokens and {given} {name} (tokens per text: {wanted})."
            )
        if is_list(media) and len(media) == len(text) and all(map(is_list_of_a_text, media)):
            per_text = [len(flatten([item])) for item in media]
            if per_text != wanted:
                raise ValueError(
                    f"`{name}`, given as one list per text, must hold {wanted} items (the number of {token!r} in each "
                    f"`text`), got {per_text}."
                )

    def _process_images(self, images: ImageInput, **kwargs) -> tuple[BatchFeature, list[str]]:
        inputs = self.image_processor(images, **kwargs)
        count = len(inputs["image_grid_thw"])
        return inputs, [self.replace_image_token(inputs, index, **kwargs) for index in range(count)]

    def _process_videos(self, videos: VideoInput, **kwargs) -> tuple[BatchFeature, list[str]]:
        inputs = self.video_processor(videos, **kwargs)
        count = len(inputs["num_chunks_per_video"])
        return inputs, [self.replace_video_token(inputs, index, **kwargs) for index in range(count)]

    def _bracket(self, token: str, num_patches: int, merge_size: int) -> str:
        return self.VISION_START_TOKEN + token * (num_patches // merge_size**2) + self.VISION_END_TOKEN

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The text that replaces the placeholder of image `image_idx` of the image processor's output."""
        merge_size = kwargs.get("merge_size") or self.image_processor.merge_size
        return self._bracket(self.image_token, int(image_inputs["image_grid_thw"][image_idx].prod()), merge_size)

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        """The text that replaces the placeholder of video `video_idx` of the video processor's output."""
        merge_size = kwargs.get("merge_size") or self.video_processor.merge_size
        temporal_patch_size = kwargs.get("temporal_patch_size") or self.video_processor.temporal_patch_size
        num_chunks = [int(count) for count in video_inputs["num_chunks_per_video"]]
        first = sum(num_chunks[:video_idx])
        chunks = video_inputs["video_grid_thw"][first : first + num_chunks[video_idx]]
        bracket = self._bracket(self.video_token, int(chunks[0, 1:].prod()), merge_size)
        grid_t = int(chunks[:, 0].sum())

        metadata = video_inputs["video_metadata"][video_idx] if "video_metadata" in video_inputs else None
        if metadata is None or metadata.fps is None or metadata.frames_indices is None:
            return bracket * grid_t
        times = metadata.timestamps
        first_times = [times[step * temporal_patch_size] for step in range(grid_t)]
        return "".join(f"]<]{time:.1f} seconds[>[{bracket}" for time in first_times)

    def _check_special_mm_tokens(self, text: list[str], text_inputs: BatchFeature, modalities: list[str]) -> None:
        # the start and end tokens too: truncation may cut between the last placeholder and its end token
        super()._check_special_mm_tokens(text, text_inputs, [*modalities, "vision_start", "vision_end"])

    def _normalize_conversations(self, conversation: Any) -> tuple[list, bool]:
        return normalize_conversations(conversation)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list | None = None,
        documents: list | None = None,
        *args,
        sanitize_control_tokens: bool = False,
        **kwargs,
    ):
        """Turns a chat or a batch of chats into a prompt, or with `tokenize=True` into model inputs.

        The other arguments and the results are those of `ProcessorMixin.apply_chat_template`. The chat template has
        two variables: `thinking_mode` ("adaptive", "enabled" or "disabled") and `model_identity` (a string).

        Args:
            conversation (list): A list of messages, or a list of such lists.
            chat_template (`str`, *optional*): A template to use instead of the processor's own.
            tools (`list`, *optional*): Tools that the model may call, as functions or mappings.
            documents (`list`, *optional*): Documents for templates that read them.
            *args (any): Further arguments of `ProcessorMixin.apply_chat_template`.
            sanitize_control_tokens (`bool`, defaults to `False`): Whether control tokens in messages, tools, documents
                and template variables stay ordinary text. Such text then cannot open or end a turn, count as an image
                or a video, or begin a tool call. Only the chat template itself writes control tokens. Text without
                control tokens has the same ids either way. By default control tokens in text act as tokens, as in
                Transformers. This option needs `tokenize=True`, and works with every other option.
            **kwargs (any): Further options of `ProcessorMixin.apply_chat_template`, and variables of the template.

        Raises:
            ValueError: A message, a part of a message, a tool call or a tool is malformed, or a string holds half of a
                surrogate pair. The message names the place.
            jinja2.TemplateError: The chat template refuses the chat, for example for an unknown role.
        """
        tools = normalize_tools(tools)
        check_text([kwargs.get("model_identity"), documents], "`model_identity` or `documents`")
        if not sanitize_control_tokens:
            return super().apply_chat_template(conversation, chat_template, tools, documents, *args, **kwargs)
        if not kwargs.get("tokenize"):
            raise ValueError(
                "`sanitize_control_tokens=True` needs `tokenize=True`: a prompt that is a string does not say which "
                "control tokens a user typed."
            )
        conversations, is_batched = self._normalize_conversations(conversation)
        others = ("processor_kwargs", "images", "videos")
        variables = {name: value for name, value in kwargs.items() if name not in others}
        walls = Walls(self.tokenizer, [conversations, tools, documents, variables])
        conversations = [[walls.around_message(message) for message in messages] for messages in conversations]
        reader = copy.copy(self)
        reader.tokenizer = walls.tokenizer
        return reader.apply_chat_template(
            conversations if is_batched else conversations[0],
            chat_template,
            walls.around(tools),
            walls.around(documents),
            *args,
            **{**kwargs, **walls.around(variables)},
        )

    def _get_num_multimodal_tokens(
        self,
        image_sizes: list[tuple[int, int]] | None = None,
        video_sizes: list[tuple[int, int, int]] | None = None,
        **kwargs,
    ) -> MultiModalData:
        """The numbers of placeholder tokens and patches that a call returns for images and videos of these sizes.

        Serving engines reserve space by them. Only placeholders count, as in `mm_token_type_ids`. The start and end
        tokens around them (two for each image and for each temporal patch of a video) and the times of a video are
        text. The frames of a video are the frames after sampling.

        Args:
            image_sizes (list of (height, width), *optional*): Size of each image, in pixels.
            video_sizes (list of (frames, height, width), *optional*): Size of each video.
            **kwargs (any): Options of the call.
        """
        options = self._merge_kwargs(**kwargs)
        counts = {}
        if image_sizes is not None:
            images_kwargs = options["images_kwargs"]
            merge_size = images_kwargs.get("merge_size") or self.image_processor.merge_size
            patches = [
                self.image_processor.get_number_of_image_patches(*size, images_kwargs=images_kwargs)
                for size in image_sizes
            ]
            counts["num_image_patches"] = patches
            counts["num_image_tokens"] = [count // merge_size**2 for count in patches]
        if video_sizes is not None:
            videos_kwargs = options["videos_kwargs"]
            merge_size = videos_kwargs.get("merge_size") or self.video_processor.merge_size
            counts["num_video_tokens"] = [
                self.video_processor.get_num_of_video_patches(*size, videos_kwargs=videos_kwargs) // merge_size**2
                for size in video_sizes
            ]
        return MultiModalData(**counts)

    def post_process_image_text_to_text(
        self,
        generated_outputs,
        skip_special_tokens: bool = True,
        clean_up_tokenization_spaces: bool = False,
        **kwargs,
    ) -> list[str]:
        """Decodes generated ids (batch, length) to one text per row. Further options go to the tokenizer."""
        return self.tokenizer.batch_decode(
            generated_outputs,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )
