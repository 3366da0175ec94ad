"""What differs between the supported releases of Transformers, 5.23 and 5.24. The model code knows one form, 5.24's.

Release 5.24 renamed `past_key_values` to `cache`: in arguments of `forward` and `generate`, in outputs, and in the
inputs that `generate` prepares. It renamed `image_hidden_states` / `video_hidden_states` of multimodal outputs to
`image_outputs` / `video_outputs`. Callers may use both names under either release. Under 5.24 the old ones give its
deprecation warnings.

    CACHE_NAME            what `generate` and the outputs' fields call the cache
    takes_cache           decorator of functions with an argument `cache`
    GenerationMixin       takes and returns the cache under both names, and gives it to PEFT under the one it knows
    MoeModelOutputWithPast, MoeCausalLMOutputWithPast, MultimodalOutputWithPast, MultimodalCausalLMOutputWithPast
                          bases of the outputs, with the fields of the installed release in its order
    output_fields         the fields of these outputs, from the names of 5.24
"""

import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, MoeModelOutputWithPast
from transformers.utils import ModelOutput, logging
from transformers.utils.deprecation import deprecate_kwarg

logger = logging.get_logger(__name__)

FIRST_UNTESTED = "5.25"  # as in pyproject.toml, for those who upgrade Transformers afterwards


def warn_if_untested(release: str) -> None:
    if Version(release).release >= Version(FIRST_UNTESTED).release:
        logger.warning(
            f"MiniMax-M3 was tested with Transformers 5.23 and 5.24. This is {release}, which may have renamed what it "
            f'relies on. `pip install "transformers<{FIRST_UNTESTED}"` installs a tested one.'
        )


warn_if_untested(transformers.__version__)

try:
    PEFT_KNOWS_OLD_NAME_ONLY = Version(importlib.metadata.version("peft")).release < (0, 22)
except importlib.metadata.PackageNotFoundError:
    PEFT_KNOWS_OLD_NAME_ONLY = False

CACHE_NAME = "cache" if "cache" in {field.name for field in fields(MoeModelOutputWithPast)} else "past_key_values"

if CACHE_NAME == "cache":
    from transformers import GenerationMixin as StockGenerationMixin
    from transformers.modeling_outputs import (
        MoeCausalLMOutputWithPast,
        MultimodalMoeBaseModelOutputWithPast,
        MultimodalMoeCausalLMOutputWithPast,
    )

    takes_cache = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")

    def output_fields(**values: Any) -> dict[str, Any]:
        return values

    class GenerationMixin(StockGenerationMixin):
        @wraps(StockGenerationMixin.prepare_inputs_for_generation)
        def prepare_inputs_for_generation(self, *args, **kwargs):
            model_inputs = super().prepare_inputs_for_generation(*args, **kwargs)
            if "cache" in model_inputs and self._peft_asks_for_inputs():
                model_inputs["past_key_values"] = model_inputs.pop("cache")
            return model_inputs

        def _peft_asks_for_inputs(self) -> bool:
            """Whether a method of a PEFT that knows the old name alone calls this model's.

            For prompt learning, PEFT puts its method in front of the model's. It adds the learned prompt where it
            finds no cache or an empty one: without the old name, it would add the prompt again at every token.
            """
            owner = getattr(self.prepare_inputs_for_generation, "__self__", self)
            return PEFT_KNOWS_OLD_NAME_ONLY and owner is not self

    class _FeatureNames:
        """The names that features had until 5.23, with the warning that Transformers gives for them."""

        def _features(self, modality: str) -> tuple[torch.Tensor, ...] | None:
            logger.warning_once(
                f"`{modality}_hidden_states` is deprecated and will return a list of all hidden states per layer from "
                f"v5.30; Use `out.{modality}_outputs.pooler_output` to obtain pooled features."
            )
            outputs = getattr(self, f"{modality}_outputs")
            return None if outputs is None else outputs.pooler_output

        @property
        def image_hidden_states(self) -> tuple[torch.Tensor, ...] | None:
            return self._features("image")

        @property
        def video_hidden_states(self) -> tuple[torch.Tensor, ...] | None:
            return self._features("video")

    @dataclass
    class MultimodalOutputWithPast(_FeatureNames, MultimodalMoeBaseModelOutputWithPast):
        pass

    @dataclass
    class MultimodalCausalLMOutputWithPast(_FeatureNames, MultimodalMoeCausalLMOutputWithPast):
        pass

else:
    from transformers import GenerationMixin as StockGenerationMixin
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast as StockMoeCausalLMOutputWithPast
    from transformers.modeling_outputs import MoeModelOutputWithPast as StockMoeModelOutputWithPast

    OLD_NAMES = {
        "cache": "past_key_values",
        "image_outputs": "image_hidden_states",
        "video_outputs": "video_hidden_states",
    }

    def _renamed(function: Callable, old: str, new: str) -> Callable:
        @wraps(function)
        def wrapper(*args, **kwargs):
            if old in kwargs:
                if new in kwargs:
                    raise ValueError(
                        f"`cache` and `past_key_values` of `{function.__name__}` are one argument, got both."
                    )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    def takes_cache(function: Callable) -> Callable:
        wrapper = _renamed(function, old="past_key_values", new="cache")
        # `generate` refuses what it does not find in signatures.
        signature = inspect.signature(function)
        wrapper.__signature__ = signature.replace(
            parameters=[
                parameter.replace(name=OLD_NAMES.get(name, name)) for name, parameter in signature.parameters.items()
            ]
        )
        return wrapper

    def output_fields(**values: Any) -> dict[str, Any]:
        for name in ("image_outputs", "video_outputs"):
            if values.get(name) is not None:
                values[name] = values[name].pooler_output
        return {OLD_NAMES.get(name, name): value for name, value in values.items()}

    class GenerationMixin(StockGenerationMixin):
        def generate(self, *args, **kwargs):
            output = _renamed(super().generate, old="cache", new="past_key_values")(*args, **kwargs)
            if isinstance(output, ModelOutput):
                output.cache = output.past_key_values  # an attribute only, as the output has no such field
            return output

        prepare_inputs_for_generation = _renamed(
            StockGenerationMixin.prepare_inputs_for_generation, old="cache", new="past_key_values"
        )

    class _NewNames:
        """The names that fields have from 5.24 on, for reading."""

        @property
        def cache(self) -> Cache | None:
            return self.past_key_values

        def __getitem__(self, key):
            return getattr(self, key) if key in OLD_NAMES else super().__getitem__(key)

        def __contains__(self, key) -> bool:
            return super().__contains__(OLD_NAMES.get(key, key))

        def get(self, key, default=None):
            return self[key] if self.__contains__(key) else default

    class _NewFeatureNames(_NewNames):
        @property
        def image_outputs(self) -> BaseModelOutputWithPooling | None:
            return _encoder_output(self.image_hidden_states)

        @property
        def video_outputs(self) -> BaseModelOutputWithPooling | None:
            return _encoder_output(self.video_hidden_states)

    def _encoder_output(features: tuple[torch.Tensor, ...] | None) -> BaseModelOutputWithPooling | None:
        return None if features is None else BaseModelOutputWithPooling(pooler_output=features)

    @dataclass
    class MoeModelOutputWithPast(_NewNames, StockMoeModelOutputWithPast):
        pass

    @dataclass
    class MoeCausalLMOutputWithPast(_NewNames, StockMoeCausalLMOutputWithPast):
        pass

    @dataclass
    class MultimodalOutputWithPast(_NewFeatureNames, ModelOutput):
        last_hidden_state: torch.Tensor | None = None
        past_key_values: Cache | None = None
        hidden_states: tuple[torch.Tensor, ...] | None = None
        attentions: tuple[torch.Tensor, ...] | None = None
        image_hidden_states: tuple[torch.Tensor, ...] | None = None
        video_hidden_states: tuple[torch.Tensor, ...] | None = None
        router_logits: tuple[torch.Tensor, ...] | None = None

    @dataclass
    class MultimodalCausalLMOutputWithPast(_NewFeatureNames, ModelOutput):
        loss: torch.Tensor | None = None
        logits: torch.Tensor | None = None
        past_key_values: Cache | None = None
        hidden_states: tuple[torch.Tensor, ...] | None = None
        attentions: tuple[torch.Tensor, ...] | None = None
        image_hidden_states: tuple[torch.Tensor, ...] | None = None
        video_hidden_states: tuple[torch.Tensor, ...] | None = None
        aux_loss: torch.Tensor | None = None
        router_logits: tuple[torch.Tensor, ...] | None = None


__all__ = [
    "CACHE_NAME",
    "GenerationMixin",
    "MoeCausalLMOutputWithPast",
    "MoeModelOutputWithPast",
    "MultimodalCausalLMOutputWithPast",
    "MultimodalOutputWithPast",
    "output_fields",
    "takes_cache",
]
