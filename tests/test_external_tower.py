"""Text towers of open_clip and transformers, from local files: the outputs of the libraries; locked means locked."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sovit.language.contrastive import sigmoid_loss
from sovit.language.open_clip_files import open_clip_tower
from sovit.language.transformers_files import transformers_tower
from sovit.language.vocabulary import load
from sovit.models.blocks import checkpoint_blocks
from sovit.optim import build_optimizer

transformers = pytest.importorskip("transformers")
WORDS = [f"word{k}" for k in range(20)]
TEXTS = ["word1 word2", "word3", "word4 word5 word6 word7", ""]
# The special tokens of each kind, as their own tokenizers have them.
SPECIAL = {
    "clip": ["<|startoftext|>", "<|endoftext|>"],  # the end pads, and has the highest id
    "siglip": ["</s>", "<unk>"],  # no beginning, the end pads
    "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
    "t5": ["<pad>", "</s>", "<unk>"],
}
MOST = 10


def tokenizer(folder: Path, kind: str) -> dict[str, int]:
    special = SPECIAL[kind]
    words = [*WORDS, *special] if kind == "clip" else [*special, *WORDS]
    ids = {word: k for k, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(ids, unk_token=words[0]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    return ids


def framed(folder: Path, frame: str, ids: dict[str, int]) -> None:
    """Have the tokenizer's file say what stands around a text, as published ones do."""
    path = str(folder / "tokenizer.json")
    made = Tokenizer.from_file(path)
    special = [(word, ids[word]) for word in frame.split() if word in ids]
    made.post_processor = processors.TemplateProcessing(single=frame, special_tokens=special)
    made.save(path)


def saved(folder: Path, kind: str, **more: Any) -> tuple[Any, dict[str, int]]:
    """A tiny random model of transformers, saved with its tokenizer; dropout where the library's default has it."""
    folder.mkdir(exist_ok=True)
    ids = tokenizer(folder, kind)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    size |= {"vocab_size": len(ids), "max_position_embeddings": MOST}
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPTextConfig(
            **size, projection_dim=12, bos_token_id=20, eos_token_id=ids["<|endoftext|>"]
        )
        model = transformers.CLIPTextModelWithProjection(config)
    elif kind == "siglip":
        config = transformers.SiglipTextConfig(
            **size, projection_size=12, pad_token_id=0
        )  # its bos and eos are wrong there
        model = transformers.SiglipTextModel(config)
    elif kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**size, pad_token_id=0))
    else:
        config = transformers.T5Config(
            d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2, vocab_size=len(ids), pad_token_id=0, eos_token_id=1
        )
        model = transformers.T5EncoderModel(config)
    for parameter in model.parameters():  # what begins as 0 or 1 would hide a part that is left out
        torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(folder)
    return model, ids


def theirs(model: Any, ids: dict[str, int], kind: str) -> torch.Tensor:
    """The library's own output for each text, with its own framing, each text by itself where it may be."""
    rows = []
    for text in TEXTS:
        words = [ids[word] for word in text.split()]
        if kind == "clip":
            tokens = [ids["<|startoftext|>"], *words, ids["<|endoftext|>"]]
            rows.append(model(torch.tensor([tokens + [ids["<|endoftext|>"]] * (MOST - len(tokens))])).text_embeds)
        elif kind == "siglip":
            tokens = [*words, ids["</s>"]]
            rows.append(model(torch.tensor([tokens + [ids["</s>"]] * (MOST - len(tokens))])).pooler_output)
        elif kind == "bert":
            tokens = [ids["[CLS]"], *words, ids["[SEP]"]]
            rows.append(model(torch.tensor([tokens])).last_hidden_state[:, 0])
        else:
            rows.append(model(torch.tensor([[*words, ids["</s>"]]])).last_hidden_state.mean(1))
    return torch.cat(rows).detach()


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_tower_of_transformers_gives_the_librarys_output(kind, tmp_path):
    """Through our vocabulary, whose padding the model does not know; no projection, as the widths are the same."""
    model, ids = saved(tmp_path, kind)
    width = 12 if kind in ("clip", "siglip") else 16
    tower = transformers_tower(tmp_path, embed_dim=width)
    tokens, cut = tower.vocabulary.batch(TEXTS, 8)
    assert not cut and not list(tower.projection.parameters())
    for mode in (True, False):
        found = tower.train(mode)(tokens)  # dropout is off in training too
        torch.testing.assert_close(found.detach(), theirs(model, ids, kind), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tower(tokens[:, :6]), found)  # none of them is longer
    assert tower.embed_dim == width and len(tower.blocks) == 2
    assert tower.length == {"clip": 9, "siglip": 10, "bert": 9, "t5": 512}[kind]


def test_the_text_part_of_a_whole_clip_and_a_clip_without_projection(tmp_path):
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, image_size=16, patch_size=8
    )
    model, ids = saved(tmp_path / "text", "clip")
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=model.config.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    ).eval()
    whole.text_model.load_state_dict(model.text_model.state_dict())
    whole.text_projection.load_state_dict(model.text_projection.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    tokenizer(tmp_path / "whole", "clip")
    tower = transformers_tower(tmp_path / "whole", embed_dim=12)
    tokens, _ = tower.vocabulary.batch(TEXTS, 8)
    torch.testing.assert_close(tower(tokens).detach(), theirs(model, ids, "clip"), rtol=1e-4, atol=1e-5)
    model.text_model.save_pretrained(tmp_path / "bare")
    tokenizer(tmp_path / "bare", "clip")
    bare = transformers_tower(tmp_path / "bare", embed_dim=16)
    torch.testing.assert_close(
        (bare(tokens) @ model.text_projection.weight.T).detach(), theirs(model, ids, "clip"), rtol=1e-4, atol=1e-5
    )


FRAMES = {
    "clip": "<|startoftext|> $A <|endoftext|>",
    "siglip": "$A </s>",
    "bert": "[CLS] $A [SEP]",
    "t5": "$A </s>",
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_the_tokenizers_file_puts_around_a_text_is_what_the_tower_does(kind, tmp_path):
    """Against the file's own frame, and a tower that usually has no beginning gets the one its file says."""
    _, ids = saved(tmp_path, kind)
    plain = transformers_tower(tmp_path, embed_dim=12 if kind in ("clip", "siglip") else 16)
    framed(tmp_path, FRAMES[kind], ids)
    tower = transformers_tower(tmp_path, embed_dim=plain.output_dim)
    tokens, _ = tower.vocabulary.batch(TEXTS, 8)
    assert tower.begin == plain.begin and torch.equal(tower(tokens), plain(tokens))
    framed(tmp_path, f"word9 {FRAMES[kind]}", ids)
    other = transformers_tower(tmp_path, embed_dim=plain.output_dim)
    assert other.begin == ids["word9"] and not torch.equal(other(tokens), plain(tokens))


def open_clip_saved(folder: Path, *, custom: bool) -> tuple[Any, Path, Path]:
    open_clip = pytest.importorskip("open_clip")
    words = tokenizer(folder, "clip")
    text = {"context_length": MOST, "vocab_size": len(words), "width": 16, "heads": 2, "layers": 2}
    if custom:  # as SigLIP's: not causal, the last token, a linear projection with bias
        text |= {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "pad_id": 3}
    vision = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    (folder / "config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(model.state_dict(), folder / "model.safetensors")
    torch.save({"state_dict": {f"module.{name}": one for name, one in model.state_dict().items()}}, folder / "model.pt")
    return model, folder / "config.json", folder


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("file", ["model.safetensors", "model.pt"])
def test_a_tower_of_open_clip_gives_the_librarys_output(file, custom, tmp_path):
    model, config, folder = open_clip_saved(tmp_path, custom=custom)
    vocabulary = load(folder)
    tower = open_clip_tower(config, folder / file, vocabulary=vocabulary, embed_dim=12)
    tokens, _ = vocabulary.batch(TEXTS, 9)
    rows = []
    for text in TEXTS:
        ids = [*vocabulary.ids(text), vocabulary.eos]
        ids = ids if custom else [vocabulary.bos, *ids]
        rows.append(ids + [3 if custom else 0] * (MOST - len(ids)))
    wanted = model.encode_text(torch.tensor(rows)).detach()
    torch.testing.assert_close(tower(tokens).detach(), wanted, rtol=1e-4, atol=1e-5)
    assert len(tower.blocks) == 2 and tower.length == (10 if custom else 9)
    assert not [name for name, _ in tower.named_parameters() if "visual" in name]


def test_open_clip_knows_its_models_by_name_and_another_shape_is_refused(tmp_path):
    _, _, folder = open_clip_saved(tmp_path, custom=False)
    with pytest.raises(ValueError, match="does not hold the text tower of ViT-B-32"):
        open_clip_tower("ViT-B-32", folder / "model.safetensors", vocabulary=load(folder), embed_dim=12)


def towers(folder: Path, *, locked: bool, embed_dim: int = 12) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in SPECIAL:
        saved(folder / kind, kind)
        found[kind] = transformers_tower(folder / kind, embed_dim=embed_dim, locked=locked)
    (folder / "open_clip").mkdir()
    _, config, place = open_clip_saved(folder / "open_clip", custom=False)
    found["open_clip"] = open_clip_tower(
        config, place / "model.safetensors", vocabulary=load(place), embed_dim=embed_dim, locked=locked
    )
    return found


@pytest.mark.parametrize("locked", [True, False])
def test_no_parameter_of_a_locked_tower_moves_and_all_of_an_unlocked_one_do(locked, tmp_path):
    """With decay, which moves what has no gradient; open_clip's users asked for it (mlfoundations/open_clip#1070)."""
    images = torch.nn.functional.normalize(torch.randn(4, 12, generator=torch.Generator().manual_seed(3)), dim=1)
    for name, tower in towers(tmp_path, locked=locked).items():
        tokens, _ = tower.vocabulary.batch(TEXTS, 9)
        before = {key: one.clone() for key, one in tower.state_dict().items()}
        optimizer = build_optimizer(tower, "adamw", lr=0.01, weight_decay=0.1, head_weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            texts, log_scale, bias = tower.train().forward_contrast(tokens)
            sigmoid_loss(images, torch.nn.functional.normalize(texts, dim=1), log_scale, bias).backward()
            optimizer.step()
        moved = {key for key, one in tower.state_dict().items() if not torch.equal(one, before[key])}
        own = {f"model.{key}" for key, _ in tower.model.named_parameters(remove_duplicate=False)}
        rest = {"log_scale", "bias", *(f"projection.{key}" for key, _ in tower.projection.named_parameters())}
        assert rest >= {"log_scale", "bias"} and rest <= moved, name
        assert moved - rest == (set() if locked else own), name
        assert tower.model.training != locked


def test_the_matrices_of_open_clip_are_decayed_and_its_vectors_are_not(tmp_path):
    """Its attention has one matrix for queries, keys and values, and its projection is one; neither is a linear layer."""
    tower = towers(tmp_path, locked=False)["open_clip"]
    optimizer = build_optimizer(tower, "adamw", lr=0.01, weight_decay=0.1, head_weight_decay=0.2)
    decayed = {id(one) for group in optimizer.param_groups if group["weight_decay"] for one in group["params"]}
    embeddings = ("token_embedding.weight", "positional_embedding")
    for name, one in tower.named_parameters():
        matrix = one.ndim == 2 and not name.endswith(embeddings)
        assert (id(one) in decayed) == matrix, name


def test_a_locked_tower_of_the_right_width_has_a_projection_to_learn(tmp_path):
    """Else it would train two numbers."""
    saved(tmp_path, "clip")
    assert transformers_tower(tmp_path, embed_dim=12, locked=True).projection.weight.shape == (12, 12)
    assert transformers_tower(tmp_path, embed_dim=7).projection.weight.shape == (7, 12)


def test_towers_go_through_checkpointing_and_their_state_is_all_there_is(tmp_path):
    """Masks and positions that are no part of the state would be lost where weights are sharded."""
    for name, tower in towers(tmp_path, locked=False).items():
        tokens, _ = tower.vocabulary.batch(TEXTS, 9)
        wanted = tower(tokens)
        state = {key: one.clone() for key, one in tower.state_dict().items()}
        assert {key for key, _ in tower.named_buffers()} <= state.keys(), name
        tower.to("meta").to_empty(device="cpu")
        tower.load_state_dict(state)
        checkpoint_blocks(tower, "full")
        found = tower(tokens)
        assert torch.equal(found, wanted), name
        found.sum().backward()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_not_run(tmp_path):
    _, config, folder = open_clip_saved(tmp_path, custom=False)
    with (folder / "bomb.pt").open("wb") as file:
        pickle.dump({"state_dict": Bomb(tmp_path / "exploded")}, file)
    with pytest.raises(ValueError, match="holds tensors only"):
        open_clip_tower(config, folder / "bomb.pt", vocabulary=load(folder), embed_dim=12)
    assert not (tmp_path / "exploded").exists()


def test_bad_files_of_open_clip_are_one_sentence(tmp_path):
    _, config, folder = open_clip_saved(tmp_path, custom=False)
    vocabulary, weights = load(folder), folder / "model.safetensors"
    (folder / "cut.safetensors").write_bytes(weights.read_bytes()[:-40])
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if "ln_final" not in k}, folder / "part.safetensors")
    (folder / "list.json").write_text("[1]")
    (folder / "hf.json").write_text(json.dumps({"embed_dim": 3, "text_cfg": {"hf_model_name": "roberta-base"}}))
    first = json.loads(config.read_text())["model_cfg"]
    first["text_cfg"]["pool_type"] = "first"
    (folder / "first.json").write_text(json.dumps(first))
    (folder / "odd.json").write_text(json.dumps({"embed_dim": 3, "text_cfg": {"colour": "red"}}))
    for model, file, words in (
        (config, "none.safetensors", "is not there"),
        (config, "cut.safetensors", "cannot be read"),
        (config, "part.safetensors", "does not hold the text tower .*ln_final"),
        ("hf-hub:someone/model", "model.safetensors", "knows no model 'hf-hub:someone/model'"),
        (folder / "none.json", "model.safetensors", "is no JSON file"),
        (folder / "list.json", "model.safetensors", "has no embed_dim and text_cfg"),
        (folder / "hf.json", "model.safetensors", "give the folder of roberta-base"),
        (folder / "first.json", "model.safetensors", "takes 'first' of its tokens"),
        (folder / "odd.json", "model.safetensors", "does not hold the text tower .*colour"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            open_clip_tower(model, folder / file, vocabulary=vocabulary, embed_dim=12)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="knows 22 tokens and its vocabulary has id"):
        open_clip_tower(config, weights, vocabulary=load(), embed_dim=12)


def test_bad_folders_of_transformers_are_one_sentence(tmp_path):
    def broken(change: Any) -> Path:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        saved(folder, "bert")
        change(folder)
        return folder

    def without(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({k: v for k, v in tensors.items() if "layer.1.output" not in k}, folder / "model.safetensors")

    def of_type(kind: str) -> Any:
        return lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": kind}))

    for change, words in (
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (of_type("gpt2"), "type 'gpt2'; text towers are read of clip"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "no .safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), "cannot be read"),
        (without, "lacks 4 weights of its text tower, the first encoder.layer.1.output"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "vocabulary .* cannot be read"),
    ):
        folder = broken(change)
        with pytest.raises(ValueError, match=words) as caught:
            transformers_tower(folder, embed_dim=12)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        transformers_tower(tmp_path / "nowhere", embed_dim=12)
    with pytest.raises(ValueError, match="knows 24 tokens"):
        transformers_tower(broken(lambda folder: None), embed_dim=12, vocabulary=load())
    saved(tmp_path / "good", "bert")
    tower = transformers_tower(tmp_path / "good", embed_dim=12)
    with pytest.raises(ValueError, match="Texts of 10 tokens are longer than the 9"):
        tower(torch.zeros(1, 10, dtype=torch.int64))
