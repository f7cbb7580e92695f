"""The model object of `halfbyte.load`: text in, text out."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypedDict, Unpack, overload

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.generation.adapters import (
    AdapterChoice,
    attach_adapters,
    mix_of,
    mixes_of,
    name_adapters,
)
from halfbyte.generation.engine import Engine
from halfbyte.generation.sampling import Sampling
from halfbyte.generation.stop_strings import StopStrings
from halfbyte.layers.segments import pack
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import DEFAULT_COMPUTE_DTYPE, load_decoder
from halfbyte.models.record import recorded_fingerprint
from halfbyte.text.tokenizer import Tokenizer

DEFAULT_MAX_NEW_TOKENS = 256


class GenerateOptions(TypedDict, total=False):
    """What `Model.generate` and its kin take by name; defaults are those of `Sampling`.

    Attributes:
        max_new_tokens: Tokens at most, 256 unless given.
        stop: Strings that end the text; they are not part of it.
        stop_at_eos: Whether the model's own stop tokens end the text; they do unless False.
        temperature: See `Sampling`.
        top_k: See `Sampling`.
        top_p: See `Sampling`.
        min_p: See `Sampling`.
        repetition_penalty: See `Sampling`.
        seed: See `Sampling`.
        adapters: What each prompt uses, one a prompt; without it, all use what `Model.use` chose.
    """

    max_new_tokens: int
    stop: Sequence[str]
    stop_at_eos: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    adapters: Sequence[AdapterChoice]


@dataclass(frozen=True, slots=True)
class TextPiece:
    """New text of one sequence.

    Attributes:
        sequence: Its index among the prompts.
        text: Possibly empty, with the last piece.
        finish: `stop` or `length` with the last piece, else None.
        num_tokens: Tokens generated for this sequence so far.
    """

    sequence: int
    text: str
    finish: str | None
    num_tokens: int


class Model:
    """A decoder with its tokenizer.

    Attributes:
        directory: Where it was opened.
        decoder: The network.
        adapters: Names of the adapters in its banks.
    """

    def __init__(self, directory: Path, decoder: Decoder, adapters: Collection[str] = ()) -> None:
        self.directory = directory
        self.decoder = decoder
        self.adapters = tuple(adapters)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the directory, opened when first used."""
        return Tokenizer.load(self.directory)

    def use(self, adapters: AdapterChoice) -> None:
        """Choose what is used from the next call on, for prompts that do not choose themselves.

        Costs nothing: factors stay where they are, and what a mix adds is weighed when it is
        computed. Text that is being generated goes on as it began.

        Args:
            adapters: One by name, several with weights (`{"sql": 0.7, "tone": -0.3}`), or None for
                the base alone.

        Raises:
            UsageError: An adapter is not loaded, or a weight is not a finite number.
        """
        self.decoder.mixes = (mix_of(adapters, self.adapters),)

    @overload
    def generate(self, prompt: str, **options: Unpack[GenerateOptions]) -> str: ...

    @overload
    def generate(
        self, prompt: list[str] | tuple[str, ...], **options: Unpack[GenerateOptions]
    ) -> list[str]: ...

    def generate(
        self, prompt: str | list[str] | tuple[str, ...], **options: Unpack[GenerateOptions]
    ) -> str | list[str]:
        """Continue a text, or several at once; only the new text is returned.

        Args:
            prompt: Plain text; names of special tokens in it are text.
            options: See `GenerateOptions`.

        Raises:
            UsageError: The options or a prompt do not fit the model.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        texts = [""] * len(prompts)
        for piece in self.stream(prompts, **options):
            texts[piece.sequence] += piece.text
        return texts[0] if isinstance(prompt, str) else texts

    def stream(
        self, prompts: Sequence[str], **options: Unpack[GenerateOptions]
    ) -> Iterator[TextPiece]:
        """`generate` in pieces, as soon as their text is final."""
        return self.stream_ids([self.tokenizer.encode(prompt) for prompt in prompts], **options)

    def chat(
        self, messages: Sequence[Mapping[str, object]], **options: Unpack[GenerateOptions]
    ) -> Iterator[TextPiece]:
        """The assistant's next turn, in pieces, through the model's own chat template.

        Raises:
            UsageError: The model has no chat template, or it does not accept the messages.
        """
        tokens = self.tokenizer.encode_chat(messages, add_generation_prompt=True)
        return self.stream_ids([list(tokens.ids)], **options)

    def stream_ids(
        self, prompts: Sequence[Sequence[int]], **options: Unpack[GenerateOptions]
    ) -> Iterator[TextPiece]:
        """`stream` for prompts that are token ids already."""
        engine = self._engine(prompts, options)
        # Checked above, at the call and not at the first piece.
        return self._pieces(engine, len(prompts), options.get("stop", ()))

    def _engine(self, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> Engine:
        if isinstance(options.get("stop", ()), str):
            raise UsageError("stop: a list of strings expected, found one string")
        chosen = {key: value for key, value in options.items() if key in Sampling.__slots__}
        mixes = []
        if "adapters" in options:
            mixes = mixes_of(options["adapters"], self.adapters, len(prompts))
        stop_ids = self.stop_ids if options.get("stop_at_eos", True) else frozenset[int]()
        return Engine(
            self.decoder,
            prompts,
            max_new_tokens=options.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS),
            sampling=Sampling(**chosen),  # type: ignore[arg-type]  # the keys are its fields
            stop_ids=stop_ids,
            mixes=mixes,
        )

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a text, by the model's config and by its tokenizer."""
        return frozenset(self.decoder.config.eos_ids) | frozenset(self.tokenizer.eos_ids)

    def _pieces(self, engine: Engine, num_prompts: int, stop: Sequence[str]) -> Iterator[TextPiece]:
        streams = [self.tokenizer.decode_stream() for _ in range(num_prompts)]
        stops = [StopStrings(stop) for _ in range(num_prompts)]
        counts = [0] * num_prompts
        while engine.running:
            for new in engine.step():
                i = new.sequence
                counts[i] += 1
                finish = new.finish
                text = "" if finish == "stop" else streams[i].push(new.token)
                if finish:
                    text += streams[i].finish()
                text = stops[i].push(text)
                if stops[i].found:
                    finish = "stop"
                    engine.stop(i)
                elif finish:
                    text += stops[i].finish()
                if text or finish:
                    yield TextPiece(i, text, finish, counts[i])

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after every token of one sequence, `[T, vocabulary]`, in the compute dtype.

        Raises:
            UsageError: No ids, or ids that the model does not have.
        """
        if not ids:
            raise UsageError("ids: at least one token expected, found none")
        return self.decoder.logits(torch.tensor(ids, dtype=torch.int64), pack([len(ids)]))


def load(
    model: str | Path,
    *,
    adapters: Sequence[str | Path] | Mapping[str, str | Path] = (),
    compute_dtype: torch.dtype = DEFAULT_COMPUTE_DTYPE,
    resident: bool = False,
) -> Model:
    """Open a model directory, 4-bit or not, to generate text. Takes milliseconds.

    Args:
        model: A Hugging Face model directory, such as `halfbyte quantize` writes.
        adapters: Directories of adapters or stacks, with names or called by their paths. All are
            used together until `Model.use` chooses.
        compute_dtype: float32, bfloat16 or float16.
        resident: Copy the weights to memory instead of mapping the files.

    Raises:
        HalfbyteError: See `models.load.load_decoder` and `attach_adapters`.
    """
    decoder = load_decoder(model, compute_dtype=compute_dtype, resident=resident)
    named = name_adapters(adapters)
    if named:
        attach_adapters(decoder, named, base=recorded_fingerprint(Path(model)))
    return Model(Path(model), decoder, named)
