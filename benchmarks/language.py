"""How fast texts are learned, written and scored: against open_clip, torch's own decoder and COCO's evaluation code.

    python benchmarks/language.py [--device cpu] [--threads 1] [--seconds 10] [--coco FOLDER] [--json FILE]
    python benchmarks/language.py --quick           # the small sizes, in under a minute
    python benchmarks/language.py --device cuda     # larger sizes, in bf16

Contestants of a row take turns in one process on the same data (`sovit.bench.turns`); a time is the median of all calls, a
ratio the median of the ratios within a turn, with their middle half. Above 1, this package is the faster one.

    LiT step    `sovit.language.tower` and the sigmoid loss against open_clip's text transformer of the same shape and its
                SigLipLoss: forward, backward, fused AdamW. The image tower is locked, its embeddings are there already.
                open_clip takes two turns: attending to padding, as its SigLIP models do, and masking it, as ours does.
    loss        the sigmoid loss alone, forward and backward
    decoder     a training step of `sovit.language.decoder` against torch.nn.TransformerDecoder of the same shape
    generation  greedy decoding with the cache of keys and values against reading the whole text again for every token
    metrics     CIDEr-D, BLEU-4 and ROUGE-L of 5,000 images with 5 captions each against pycocoevalcap, whose folder
                ``--coco`` names; without it, ours alone. Words are parted at spaces by both.

Before anything is timed, what can be equal is checked to be: losses, generated tokens, scores.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from scorers import contests, reference
from sovit.bench.turns import Turns, latency, ratio, take_turns
from sovit.language.contrastive import BIAS, LOG_SCALE, sigmoid_loss
from sovit.language.decoder import Decoder, build_decoder
from sovit.language.generate import greedy
from sovit.language.tower import build_tower
from sovit.launch.pay.hardware import hardware

PAD, BOS, EOS = 0, 1, 2


@dataclass(frozen=True)
class Sizes:
    """Of a LiT step and of a decoder with its image tokens."""

    shape: str  # WIDTHxDEPTHxMLP of the text tower
    num_heads: int
    batch: int
    length: int
    vocabulary: int
    embed_dim: int
    pairs: int  # of the loss alone
    decoder: str
    decoder_batch: int
    memory: tuple[int, int]  # image tokens and their width


SMALL = Sizes("64x4x256", 4, 128, 32, 512, 64, 1024, "64x2x128", 64, (64, 64))
SIZES = {
    "cpu": (SMALL, Sizes("192x12x768", 3, 32, 64, 8192, 192, 2048, "192x2x768", 16, (196, 192))),
    "cuda": (
        Sizes("512x12x2048", 8, 2048, 64, 32000, 512, 8192, "512x2x2048", 256, (196, 768)),
        Sizes("768x12x3072", 12, 1024, 64, 32000, 768, 16384, "512x2x2048", 256, (256, 1152)),
    ),
}
IMAGES = 5000
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}

Row = dict[str, Any]


class Bench:
    """The device, its clock, and how long a contestant has."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.gpu = self.device.type == "cuda"
        self.seconds = options.seconds
        self.clock = CLOCKS[options.clock]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cuda", torch.bfloat16) if self.gpu else contextlib.nullcontext()

    def row(self, what: str, contestants: dict[str, Callable[[], Any]], units: dict[str, int]) -> Row:
        """Times of all contestants, the first one's rates, and the ratios of the others to it."""

        def done(call: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                call()
                if self.gpu:
                    torch.cuda.synchronize()

            return run

        ready = {name: done(call) for name, call in contestants.items()}
        for call in ready.values():
            call()
        turns: Turns = take_turns(ready, self.seconds, clock=self.clock)
        ours, *others = contestants
        found = {name: latency(of)["p50"] for name, of in turns.items()}
        row = {
            "what": what,
            "ms": found,
            "per_second": {unit: 1e3 * num / found[ours] for unit, num in units.items()},  # type: ignore[operator]
            "ratios": {name: ratio(turns, name, ours) for name in others},
            "load": os.getloadavg()[0],
        }
        print(shown(row), flush=True)
        return row


def shown(row: Row) -> str:
    """A line of the table."""
    rates = ", ".join(f"{rate:,.0f} {unit}/s" for unit, rate in row["per_second"].items())
    ratios = ", ".join(
        f"{of['median']:.2f} ({of['lo']:.2f}-{of['hi']:.2f}) {name}" for name, of in row["ratios"].items()
    )
    first = next(iter(row["ms"].values()))
    return f"| {row['what']} | {first:,.2f} | {rates} | {ratios or 'nothing else'} | {row['load']:.1f} |"


def lit_step(bench: Bench, sizes: Sizes) -> Row:
    """A step of the text tower, by three."""
    width, depth, mlp_dim = map(int, sizes.shape.split("x"))
    shape = SimpleNamespace(width=width, depth=depth, mlp_dim=mlp_dim, num_heads=sizes.num_heads)
    tokens = texts(sizes.batch, sizes.length, sizes.vocabulary, bench.device)
    images = F.normalize(torch.randn(sizes.batch, sizes.embed_dim, device=bench.device), dim=-1)
    with bench.device:
        tower = build_tower(
            shape, vocabulary_size=sizes.vocabulary, length=sizes.length, embed_dim=sizes.embed_dim, eos=EOS
        )
    mine = fused(tower.parameters())

    def ours() -> None:
        with bench.autocast():
            embedded, log_scale, bias = tower.forward_contrast(tokens)
            assert bias is not None
            loss = sigmoid_loss(images, F.normalize(embedded.float(), dim=-1), log_scale, bias)
        mine.zero_grad(set_to_none=True)
        loss.backward()
        mine.step()

    def theirs(masked: bool) -> Callable[[], None]:
        model = TextTransformer(
            context_length=sizes.length, vocab_size=sizes.vocabulary, width=width, heads=sizes.num_heads, layers=depth,
            mlp_ratio=mlp_dim / width, output_dim=sizes.embed_dim, no_causal_mask=True, use_pad_mask=masked, pad_id=PAD,
            eos_id=EOS, pool_type="eos", proj_bias=True, act_layer=functools.partial(nn.GELU, approximate="tanh"),
        ).to(bench.device)  # fmt: skip
        log_scale, bias = (nn.Parameter(torch.tensor(float(v), device=bench.device)) for v in (LOG_SCALE, BIAS))
        loss_of = SigLipLoss()
        optimizer = fused([*model.parameters(), log_scale, bias])

        def step() -> None:
            with bench.autocast():
                embedded = F.normalize(model(tokens), dim=-1)
                loss = loss_of(images, embedded, log_scale.exp(), bias)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        return step

    return bench.row(
        f"LiT step, {sizes.shape}, {sizes.batch} texts of {sizes.length} tokens",
        {"ours": ours, "open_clip": theirs(False), "open_clip with masks": theirs(True)},
        {"images": sizes.batch, "tokens": sizes.batch * sizes.length},
    )


def loss_alone(bench: Bench, sizes: Sizes) -> Row:
    """The sigmoid loss and its gradients by texts, scale and bias."""
    num, dim = sizes.pairs, sizes.embed_dim
    images, rows = (F.normalize(torch.randn(num, dim, device=bench.device), dim=-1) for _ in range(2))
    rows.requires_grad_()
    log_scale, bias = (torch.full((1,), v, device=bench.device, requires_grad=True) for v in (LOG_SCALE, BIAS))
    siglip = SigLipLoss()

    def ours() -> Tensor:
        return differentiated(sigmoid_loss(images, rows, log_scale, bias))

    def theirs() -> Tensor:
        return differentiated(siglip(images, rows, log_scale.exp(), bias))

    def differentiated(loss: Tensor) -> Tensor:
        torch.autograd.grad(loss, (rows, log_scale, bias))
        return loss.detach()

    torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)
    name = f"sigmoid loss, {num} pairs of {dim}"
    return bench.row(name, {"ours": ours, "open_clip": theirs}, {"pairs": num})


class TorchDecoder(nn.Module):
    """torch's decoder in the place of ours: the same embeddings, norms, projection and head around it."""

    def __init__(self, ours: Decoder, width: int, depth: int, mlp_dim: int, num_heads: int) -> None:
        super().__init__()
        self.around = ours
        layer = nn.TransformerDecoderLayer(
            width, num_heads, mlp_dim, 0.0, functools.partial(F.gelu, approximate="tanh"), batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.decoder = nn.TransformerDecoder(layer, depth, norm=nn.LayerNorm(width))
        self.around.blocks = nn.ModuleList()

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        around, length = self.around, tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        x = around.embedding(tokens) + around.positions[:length]
        memory = around.memory_proj(around.memory_norm(memory))
        return around.head(self.decoder(x, memory, tgt_mask=mask, tgt_is_causal=True))


def decoder_step(bench: Bench, sizes: Sizes) -> Row:
    """A step of the decoder on whole texts, by two."""
    model, memory, parts = decoder_of(bench, sizes)
    tokens = texts(sizes.decoder_batch, sizes.length, sizes.vocabulary, bench.device)
    other = TorchDecoder(decoder_of(bench, sizes)[0], *parts, num_heads=sizes.num_heads).to(bench.device)

    def step(model: nn.Module) -> Callable[[], None]:
        optimizer = fused(model.parameters())

        def run() -> None:
            with bench.autocast():
                logits = model(tokens[:, :-1], memory)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), ignore_index=PAD)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        return run

    return bench.row(
        f"decoder step, {sizes.decoder}, {sizes.decoder_batch} texts, {sizes.memory[0]} image tokens",
        {"ours": step(model.train()), "torch.nn.TransformerDecoder": step(other.train())},
        {"texts": sizes.decoder_batch, "tokens": sizes.decoder_batch * sizes.length},
    )


def generation(bench: Bench, sizes: Sizes) -> Row:
    """Greedy decoding to the full length, with the cache and without."""
    model, memory, _ = decoder_of(bench, sizes)
    nn.init.normal_(model.head.weight)  # it starts at zero, where every token is as likely
    model.eval()
    prompts = [[BOS]] * sizes.decoder_batch
    num = sizes.length - 1

    def with_cache() -> Tensor:
        return greedy(model, prompts, memory, eos=-1, pad=PAD, max_tokens=num).tokens

    @torch.no_grad()
    def without() -> Tensor:
        tokens = torch.tensor(prompts, device=bench.device)
        for _ in range(num):
            tokens = torch.cat([tokens, model(tokens, memory)[:, -1].argmax(-1, keepdim=True)], 1)
        return tokens[:, 1:]

    same = (with_cache() == without()).all(1).float().mean()  # rounding may decide between two tokens nearly as likely
    assert same > 0.95, f"the cache changes {1 - same:.0%} of the texts"
    return bench.row(
        f"greedy decoding, {sizes.decoder}, {sizes.decoder_batch} texts of {num} tokens",
        {"ours": with_cache, "without cache": without},
        {"tokens": sizes.decoder_batch * num},
    )


def texts(num: int, length: int, vocabulary: int, device: torch.device) -> Tensor:
    """Tokens [num, length] of texts that take half to all of the length, with their end and padding."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(EOS + 1, vocabulary, (num, length), generator=generator)
    ends = torch.randint(length // 2, length, (num, 1), generator=generator)
    places = torch.arange(length)
    tokens[places.expand(num, -1) == ends] = EOS
    tokens[places.expand(num, -1) > ends] = PAD
    return tokens.to(device)


def decoder_of(bench: Bench, sizes: Sizes) -> tuple[Decoder, Tensor, tuple[int, int, int]]:
    """The decoder, image tokens for a batch, and its (width, depth, mlp_dim)."""
    width, depth, mlp_dim = map(int, sizes.decoder.split("x"))
    torch.manual_seed(0)
    with bench.device:
        model = build_decoder(
            encoder_width=sizes.memory[1], vocabulary_size=sizes.vocabulary, width=width, depth=depth, mlp_dim=mlp_dim,
            num_heads=sizes.num_heads, length=sizes.length,
        )  # fmt: skip
        memory = torch.randn(sizes.decoder_batch, *sizes.memory)
    return model, memory, (width, depth, mlp_dim)


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, default=10, help="of every contestant of a row, at the least five turns"
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: on a busy machine, on a CPU only")
    parser.add_argument("--quick", action="store_true", help="small sizes, half a second each")
    parser.add_argument("--coco", metavar="FOLDER", help="the folder that holds the package pycocoevalcap")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave it out to measure on the CPU.")
    if options.quick:
        options.seconds = min(options.seconds, 0.5)
    torch.set_num_threads(options.threads)
    bench, coco = Bench(options), reference(options.coco)
    machine = hardware("gpu" if bench.gpu else "cpu")
    place = (
        ", ".join(machine["gpus"]) if bench.gpu else f"{machine['cpu']}, {options.threads} of {machine['cores']} cores"
    )
    print(f"{time.strftime('%Y-%m-%d')}, {place}, torch {machine['torch']}, sovit {machine['sovit']}\n")
    print("| what | ms | rate | times as fast as | load |\n|---|---:|---:|---:|---:|")
    rows: list[Row] = []
    for sizes in SIZES[options.device][: 1 if options.quick else None]:
        rows += [part(bench, sizes) for part in (lit_step, loss_alone, decoder_step, generation)]
    rows += [bench.row(*contest) for contest in contests(IMAGES // 10 if options.quick else IMAGES, coco)]
    if not coco:
        print("\nNot measured: pycocoevalcap, which --coco FOLDER would name.")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
