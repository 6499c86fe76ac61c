"""Text to token ids and back: a Hugging Face ``tokenizer.json``, or the small byte-level vocabulary that is shipped.

Byte-level BPE (Sennrich et al., arXiv 1508.07909; over the 256 bytes, as in GPT-2) knows no unknown text. Texts are
normalised first (NFC, lower case, no space in front), and what comes back is the normalised text. Special tokens are never
found in a text: a caption that says ``<eos>`` is that word. Does not download anything and runs no code of a file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
SMALLEST = 256 + 3  # every byte and the three special tokens
LONGEST = 200  # characters of a word in training
_RARE = "qzxjkvw ᚠⰀ"  # a word, and letters, that a vocabulary of words hardly holds
_USUAL = {
    "pad": (PAD, "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "bos": (BOS, "<s>", "[BOS]", "[CLS]", "<|startoftext|>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos": (EOS, "</s>", "[EOS]", "[SEP]", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>"),
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and the ids that frame a text. Ids are 0 .. ``size`` - 1.

    A file without a token for padding or for a beginning gets an id of its own for it, behind all others (GPT-2, CLIP, T5).
    """

    size: int
    pad: int
    bos: int
    eos: int
    identity: str  # sha256 of the file
    content: str = field(repr=False)  # the file
    tokenizer: Tokenizer = field(repr=False, compare=False)

    def __reduce__(self) -> tuple[Callable[[str, str], Vocabulary], tuple[str, str]]:
        return _made, (self.content, "the vocabulary")  # a pickled tokenizer forgets what is set on it below

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens. Halves of a surrogate pair become U+FFFD."""
        return self.tokenizer.encode(_whole(text), add_special_tokens=False).ids if text else []

    def text(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens say nothing. Raises ValueError for an id that is not there."""
        ids = [int(k) for k in ids]
        outside = next((k for k in ids if not 0 <= k < self.size), None)
        if outside is not None:
            raise ValueError(f"Token id {outside} is not in 0 .. {self.size - 1}, the ids of this vocabulary.")
        said = [k for k in ids if k not in (self.pad, self.bos, self.eos)]
        return self.tokenizer.decode(said, skip_special_tokens=True).removeprefix(" ")

    def batch(self, texts: Sequence[str], length: int) -> tuple[Tensor, int]:
        """Ids and ``eos`` of each text, padded to ``length``: int64 [B, length]; and how many texts were cut to it.

        A text that is cut keeps its ``eos``. Raises ValueError for a length below 1.
        """
        if length < 1:
            raise ValueError(f"length={length} is below 1; a text needs room for its end at least.")
        tokens = torch.full((len(texts), length), self.pad, dtype=torch.int64)
        cut = 0
        found = self.tokenizer.encode_batch_fast([_whole(text) for text in texts], add_special_tokens=False)
        for row, text, encoding in zip(tokens, texts, found, strict=True):
            ids = encoding.ids if text else []
            cut += len(ids) >= length
            ids = [*ids[: length - 1], self.eos]
            row[: len(ids)] = torch.tensor(ids)
        return tokens, cut


def load(path: str | Path | None = None) -> Vocabulary:
    """The vocabulary of a ``tokenizer.json``, or the shipped one.

    Raises ValueError, in one sentence, for what cannot be read, what is no such file, and a file without an end token.
    """
    if path is None:
        return _made(files("sovit.language").joinpath("vocabulary.json").read_text("utf-8"), "the shipped vocabulary")
    where = Path(path).expanduser()
    if where.is_dir():
        where = where / "tokenizer.json"
    if where.suffix == ".model":
        raise ValueError(
            f"{where} is a SentencePiece model; give the tokenizer.json that transformers writes of it (save_pretrained)."
        )
    try:
        content = where.read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{where} is no text; give a tokenizer.json of the tokenizers library.") from None
    except OSError as error:
        raise ValueError(
            f"The vocabulary {where} cannot be read ({error.strerror}); give a tokenizer.json, or none for the shipped one."
        ) from None
    return _made(content, str(where))


def train(texts: Iterable[str], size: int = 512) -> Vocabulary:
    """Byte-level BPE of at most ``size`` tokens over the texts: fewer if these hold no more pairs that occur twice.

    Raises ValueError for a size that does not hold the bytes and the special tokens.
    """
    if size < SMALLEST:
        raise ValueError(
            f"size={size} is below {SMALLEST}, the 256 bytes and three special tokens; choose a larger one."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip(left=True, right=False)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator((_in_words(_whole(text)) for text in texts), trainer)
    return _made(tokenizer.to_str(pretty=True), "the trained vocabulary")


def save(vocabulary: Vocabulary, path: str | Path) -> None:
    """Write the file that `load` reads; it is whole or not there."""
    where = Path(path)
    where.parent.mkdir(parents=True, exist_ok=True)
    beside = where.with_name(f".{where.name}.{os.getpid()}")
    try:
        beside.write_text(vocabulary.content, "utf-8")
        os.replace(beside, where)
    finally:
        beside.unlink(missing_ok=True)


def _made(content: str, where: str) -> Vocabulary:
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # its threads do not survive the fork of a loader's workers
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises Exception itself
        raise ValueError(
            f"{where} is no tokenizer.json of the tokenizers library ({error}); give one, or none for the shipped one."
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    try:
        tokenizer.encode(_RARE, add_special_tokens=False)
    except Exception as error:  # the library raises Exception itself
        raise ValueError(
            f"{where} cannot read every text ({error}); it needs a token for what it does not know."
        ) from None
    found = {
        name: next((k for token in usual if (k := tokenizer.token_to_id(token)) is not None), None)
        for name, usual in _USUAL.items()
    }
    eos = found["eos"]
    if eos is None:
        raise ValueError(f"{where} has no token for the end of a text; it needs one of {', '.join(_USUAL['eos'])}.")
    size = 1 + max(tokenizer.get_vocab().values())
    bos = size if found["bos"] is None else found["bos"]
    size = max(size, bos + 1)
    pad = size if found["pad"] is None else found["pad"]
    identity = hashlib.sha256(content.encode()).hexdigest()
    return Vocabulary(max(size, pad + 1), pad, bos, eos, identity, content, tokenizer)


def _in_words(text: str) -> str:
    """The text with a space after every LONGEST characters without one: the time of training grows with their square."""
    return re.sub(rf"(\S{{{LONGEST}}})", r"\1 ", re.sub(rf"(\s{{{LONGEST}}})\s+", r"\1", text))


def _whole(text: str) -> str:
    """The text without lone surrogates, which no UTF-8 can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
