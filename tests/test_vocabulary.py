"""Texts come back from their ids, whatever they hold; others' tokenizer files serve; what does not is one sentence."""

import hashlib
import json
import random
from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sovit import cli
from sovit.language import scenes, vocabulary
from sovit.language.vocabulary import load, save, train

SHIPPED = load()
STRANGE = {
    "scripts": "日本語 Ελληνικά हिन्दी עברית",
    "emoji": "👩‍👩‍👧‍👦🇨🇭 1️⃣",
    "control": "a\x00b\x1bc\u200b\ufeff",
    "spaces": "a  b\t\n",
    "special": "<eos> </s> <pad> [SEP]",
}


def random_texts():
    dice = random.Random(0)
    ranges = [(0, 0x250), (0x300, 0x370), (0x3040, 0xD7FF), (0x1F300, 0x1FAFF)]
    for _ in range(300):
        yield "".join(chr(dice.randint(*dice.choice(ranges))) for _ in range(dice.randint(0, 30)))


# ------------------------------------------------------------------------------------------------------ round trip


def test_texts_come_back_as_the_normaliser_leaves_them():
    for text in [*STRANGE.values(), *random_texts(), *list(scenes.texts(50))]:
        ids = SHIPPED.ids(text)
        assert SHIPPED.text(ids) == SHIPPED.tokenizer.normalizer.normalize_str(text)
        assert all(0 <= k < SHIPPED.size for k in ids)
        assert not {SHIPPED.pad, SHIPPED.bos, SHIPPED.eos} & set(ids)


def test_case_composition_and_a_space_in_front_make_no_difference():
    assert SHIPPED.ids(" A SMALL Moru") == SHIPPED.ids("a small moru")
    assert SHIPPED.ids("e\u0301") == SHIPPED.ids("\u00e9")
    assert SHIPPED.text(SHIPPED.ids("vqa: Where?\n")) == "vqa: where?\n"  # the end of a prompt stays


def test_a_lone_surrogate_is_survived():
    assert SHIPPED.text(SHIPPED.ids("a\ud800b")) == "a\ufffdb"
    assert SHIPPED.text(SHIPPED.ids("\ud83d\ude00")) == "\U0001f600"  # a pair of halves is a character


def test_every_word_of_the_scenes_is_one_token():
    words = [*scenes.NAMES, *scenes.DIGITS, "small", "large", "bright", "dim", "upper", "left", "yes", "nothing"]
    assert {word: len(SHIPPED.ids(word)) for word in words} == dict.fromkeys(words, 1)


# ----------------------------------------------------------------------------------------------------------- batch


def test_batch_cuts_counts_and_keeps_the_end():
    texts = ["", "a small moru", "a small moru in", "x" * 100_000]
    tokens, cut = SHIPPED.batch(texts, 4)
    a, small, moru, _ = SHIPPED.ids("a small moru in")
    eos, pad = SHIPPED.eos, SHIPPED.pad
    assert tokens[:3].tolist() == [[eos, pad, pad, pad], [a, small, moru, eos], [a, small, moru, eos]]
    assert tokens[3, 3] == eos and tokens.dtype == torch.int64
    assert cut == 2
    assert SHIPPED.batch(["a", ""], 1)[0].tolist() == [[eos], [eos]]
    assert SHIPPED.batch([], 3)[0].shape == (0, 3)
    with pytest.raises(ValueError, match="length=0 is below 1"):
        SHIPPED.batch(["a"], 0)


def test_a_batch_says_the_same_as_its_texts_alone():
    texts = [*STRANGE.values(), *random_texts()]
    tokens, _ = SHIPPED.batch(texts, 200)
    for row, text in zip(tokens.tolist(), texts, strict=True):
        ids = SHIPPED.ids(text)
        assert row == [*ids, SHIPPED.eos] + [SHIPPED.pad] * (199 - len(ids))


def test_an_id_that_is_not_there_is_a_sentence():
    for k in (-1, SHIPPED.size):
        with pytest.raises(ValueError, match=rf"Token id {k} is not in 0 \.\. {SHIPPED.size - 1}, the ids of this"):
            SHIPPED.text([5, k])
    assert SHIPPED.text([SHIPPED.bos, *SHIPPED.ids("a 7"), SHIPPED.eos, SHIPPED.pad]) == "a 7"


# -------------------------------------------------------------------------------------------------------- training


def test_shipped_file_is_what_training_on_the_scenes_gives():
    """Anew: vocabulary.save(vocabulary.train(scenes.texts(), 512), "src/sovit/language/vocabulary.json")."""
    assert json.loads(train(scenes.texts(), 512).content) == json.loads(SHIPPED.content)


def test_saved_and_sent_to_another_process_it_is_the_same(tmp_path):
    import pickle

    made = train(["zwei Hunde", "zwei Katzen"] * 3, 300)
    save(made, tmp_path / "new" / "v.json")
    again = load(tmp_path / "new" / "v.json")
    assert again == made == load(tmp_path / "new" / "v.json")
    assert made.identity == hashlib.sha256((tmp_path / "new" / "v.json").read_bytes()).hexdigest() != SHIPPED.identity
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "v.json"]
    sent = pickle.loads(pickle.dumps(made))
    assert sent == made and sent.ids("<eos> hunde") == made.ids("<eos> hunde")


def test_training_survives_words_without_an_end():
    made = train(["日本" * 20_000, "\n" * 100_000, "a" * 100_000, "\ud800", ""], 300)
    assert made.text(made.ids("日本 a\ud800")) == "日本 a\ufffd"
    with pytest.raises(ValueError, match="size=258 is below 259"):
        train(["a"], 258)


# -------------------------------------------------------------------------------------------------- files of others


def written(path, specials, model=None, change: Callable[[Tokenizer], None] = lambda tokenizer: None):
    """A file as others write it: a word-level or other model with the given special tokens."""
    words = {word: k for k, word in enumerate([*specials, "[UNK]", "a", "cat", "dog"])}
    tokenizer = Tokenizer(model(words) if model else models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(specials))
    change(tokenizer)
    tokenizer.save(str(path))
    return load(path)


def test_special_tokens_are_found_by_their_usual_names(tmp_path):
    """(names as in the file, ids found, number of ids): bert, llama, gpt-2, clip, t5."""
    for names, frame, size in (
        (("[PAD]", "[CLS]", "[SEP]"), (0, 1, 2), 7),
        (("<s>", "</s>", "<pad>"), (2, 0, 1), 7),
        (("<|endoftext|>",), (5, 0, 0), 6),  # no padding: an id behind the others
        (("<|startoftext|>", "<|endoftext|>"), (6, 0, 1), 7),
        (("<pad>", "</s>"), (0, 6, 1), 7),  # no beginning: the same
    ):
        made = written(tmp_path / "tokenizer.json", names)
        assert ((made.pad, made.bos, made.eos), made.size) == (frame, size)
        assert made.pad not in (made.bos, made.eos)
        tokens, _ = made.batch(["a cat"], 4)
        assert made.text(tokens[0].tolist()) == "a cat"
        assert load(tmp_path) == made  # the folder will do


def test_what_a_file_of_others_adds_cuts_or_pads_does_not_matter(tmp_path):
    from tokenizers.processors import TemplateProcessing

    def busy(tokenizer):
        tokenizer.enable_truncation(2)
        tokenizer.enable_padding(length=9)
        tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])

    made = written(tmp_path / "t.json", ("[PAD]", "[CLS]", "[SEP]"), change=busy)
    assert made.ids("a cat a dog") == [4, 5, 4, 6]


def test_a_word_piece_file_speaks(tmp_path):
    def pieces(tokenizer):
        tokenizer.decoder = decoders.WordPiece()

    made = written(
        tmp_path / "t.json",
        ("[PAD]", "[CLS]", "[SEP]"),
        lambda words: models.WordPiece({**words, "##s": len(words)}, unk_token="[UNK]"),
        pieces,
    )
    assert made.text(made.ids("cats a dog")) == "cats a dog"


def test_what_is_no_vocabulary_is_one_sentence(tmp_path):
    files = {
        "none.json": None,
        "spiece.model": b"\x0a\x0e\x0a\x05<unk>",
        "binary.json": b"\xff\xfe\x00",
        "list.json": b"[1, 2]",
        "half.json": SHIPPED.content.encode()[:2000],
        "coco.json": b'{"annotations": []}',
    }
    said = {}
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as caught:
            load(tmp_path / name)
        said[name] = str(caught.value)
        assert name in said[name] and "\n" not in said[name] and said[name].endswith(".")
    assert "cannot be read (No such file or directory)" in said["none.json"]
    assert "is a SentencePiece model; give the tokenizer.json" in said["spiece.model"]
    assert all("tokenizers library" in said[name] for name in ("binary.json", "list.json", "half.json", "coco.json"))
    with pytest.raises(ValueError, match=r"has no token for the end of a text; it needs one of <eos>, </s>, "):
        written(tmp_path / "t.json", ("<pad>",))
    with pytest.raises(ValueError, match=r"cannot read every text .*; it needs a token for what it does not know\.$"):
        written(tmp_path / "t.json", ("</s>",), lambda words: models.WordLevel({"</s>": 0, "a": 1}, unk_token="?"))


# --------------------------------------------------------------------------------------------------------- command


def test_a_vocabulary_of_ones_own(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("Zwei Hunde 🐕\n\nzwei Katzen\n", "utf-8")
    coco = {"images": [{"id": 1, "file_name": "hidden.jpg"}], "annotations": [{"image_id": 1, "caption": "zwei Hunde"}]}
    (tmp_path / "b.json").write_text(json.dumps(coco))
    (tmp_path / "c.json").write_text(json.dumps({"1": {"question": "zwei?", "answers": ["zwei"]}}))
    out = tmp_path / "o" / "v.json"
    paths = [str(tmp_path / name) for name in ("a.txt", "b.json", "c.json")]
    assert cli.main(["vocabulary", *paths, "-o", str(out), "--size", "270"]) == 0
    assert load(out) == train(["Zwei Hunde 🐕", "zwei Katzen", "zwei Hunde", "zwei?", "zwei"], 270)
    assert len(load(out).ids("zwei")) == 1
    assert capsys.readouterr().out.startswith("5 texts, 9 words, 42 characters: ")


def test_a_file_nested_deeply_is_read_or_refused_in_a_sentence(tmp_path, capsys):
    """From Python 3.12 on JSON is read to a depth that leaves no room for a walk that calls itself."""
    path = tmp_path / "a.json"
    for depth in (900, 3000, 100_000):
        path.write_text('{"captions":' * depth + '"a dog"' + "}" * depth)
        code = cli.main(["vocabulary", str(path), "-o", str(tmp_path / "v.json")])
        said = capsys.readouterr()
        assert (code, said.out[:17]) == (0, "1 texts, 2 words,") or (code == 2 and "is nested too deeply" in said.err)


def test_command_refuses_what_holds_no_text(tmp_path, capsys):
    for name, content, words in (
        ("empty.txt", b"\n\n", "holds no text"),
        ("binary.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("half.json", b'{"annotations": [', "is no whole JSON file"),
        ("other.json", b'{"a": {"b": "c"}}', "holds no text"),
    ):
        (tmp_path / name).write_bytes(content)
        assert cli.main(["vocabulary", str(tmp_path / name), "-o", str(tmp_path / "v.json")]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "v.json").exists()
    text = str(tmp_path / "captions.txt")
    (tmp_path / "captions.txt").write_text("a cat\n")
    assert cli.main(["vocabulary", text, "-o", text]) == 2
    assert "is one of the texts" in capsys.readouterr().err and (tmp_path / "captions.txt").read_text() == "a cat\n"


def test_words_of_a_special_token_in_a_text_are_words():
    """An end token in somebody's caption would otherwise end it, and a pad token be masked."""
    assert vocabulary.EOS in SHIPPED.text(SHIPPED.ids("a <eos> b"))
