"""Decoding with a cache is decoding without one, a wide enough beam is brute force, and one beam is greedy."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from sovit.language.decoder import Decoder, build_decoder
from sovit.language.generate import Generated, beam, greedy

EOS, PAD = 0, 1


def made(vocabulary_size: int = 9, seed: int = 0, dtype: torch.dtype = torch.float64, spread: float = 1.0) -> Decoder:
    torch.manual_seed(seed)
    decoder = build_decoder(
        encoder_width=6, vocabulary_size=vocabulary_size, width=8, mlp_dim=12, num_heads=2, length=20
    )
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=1.0)
    nn.init.normal_(decoder.head.weight, std=spread)
    nn.init.zeros_(decoder.head.bias)  # or it would say the same of every image
    nn.init.zeros_(decoder.norm.bias)
    return decoder.to(dtype).eval()


def given(
    num: int, vocabulary_size: int = 9, seed: int = 1, dtype: torch.dtype = torch.float64
) -> tuple[list[list[int]], Tensor]:
    """Prompts of 1 to 5 tokens and an image each."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(vocabulary_size, (1 + k % 5,), generator=generator).tolist() for k in range(num)]
    return prompts, 2 * torch.randn(num, 3, 6, generator=generator, dtype=torch.float64).to(dtype)


@torch.no_grad()
def log_prob(decoder: Decoder, prompt: list[int], image: Tensor, text: list[int]) -> float:
    """Of a text after its prompt, in one pass without cache."""
    log_probs = decoder(torch.tensor([prompt + text]), image[None])[0].log_softmax(-1)
    return sum(float(log_probs[len(prompt) - 1 + k, token]) for k, token in enumerate(text))


def said(found: Generated, row: int) -> list[int]:
    """Up to its eos."""
    text = found.tokens[row].tolist()
    return text[: text.index(EOS) + 1] if EOS in text else text


@torch.no_grad()
def uncached(decoder: Decoder, prompt: list[int], image: Tensor, max_tokens: int) -> list[int]:
    text: list[int] = []
    while len(text) < max_tokens and text[-1:] != [EOS]:
        text.append(int(decoder(torch.tensor([prompt + text]), image[None])[0, -1].argmax()))
    return text


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_greedy_with_a_cache_is_greedy_without(dtype: torch.dtype, tolerance: float) -> None:
    decoder = made(dtype=dtype)
    prompts, memory = given(12, dtype=dtype)
    found = greedy(decoder, prompts, memory, eos=EOS, pad=PAD, max_tokens=7)
    ended = 0
    for row, prompt in enumerate(prompts):
        text = uncached(decoder, prompt, memory[row], 7)
        assert said(found, row) == text
        assert (found.tokens[row, len(text) :] == PAD).all()
        assert float(found.log_probs[row]) == pytest.approx(log_prob(decoder, prompt, memory[row], text), abs=tolerance)
        ended += text[-1] == EOS
    assert 0 < ended < 12, "the case should have both texts that end and texts that are cut off"


@torch.no_grad()
def possible(decoder: Decoder, prompt: list[int], image: Tensor, size: int, most: int) -> dict[tuple[int, ...], float]:
    """Every text that can come out, with its log-probability."""
    texts = [
        text
        for length in range(1, most + 1)
        for text in itertools.product(range(size), repeat=length)
        if EOS not in text[:-1] and (text[-1] == EOS or length == most)
    ]
    return {text: log_prob(decoder, prompt, image, list(text)) for text in texts}


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 4.0])
def test_a_beam_wide_enough_finds_what_brute_force_finds(length_penalty: float) -> None:
    size, most = 3, 4
    lengths = set()
    for seed in range(4):
        decoder = made(size, seed)
        prompts, memory = given(3, size, seed)
        found = beam(
            decoder, prompts, memory, eos=EOS, pad=PAD, max_tokens=most, beams=size**most, length_penalty=length_penalty
        )
        for row, prompt in enumerate(prompts):
            every = possible(decoder, prompt, memory[row], size, most)
            assert sum(torch.tensor(list(every.values())).exp()) == pytest.approx(1, abs=1e-6)
            best = max(every, key=lambda text: every[text] / ((5 + len(text)) / 6) ** length_penalty)
            assert tuple(said(found, row)) == best
            assert float(found.log_probs[row]) == pytest.approx(every[best], abs=1e-12)
            lengths.add(len(best))
    assert len(lengths) > 1


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_one_beam_is_greedy(length_penalty: float) -> None:
    decoder = made()
    prompts, memory = given(20)
    options = {"eos": EOS, "pad": PAD, "max_tokens": 6}
    found = beam(decoder, prompts, memory, beams=1, length_penalty=length_penalty, **options)
    expected = greedy(decoder, prompts, memory, **options)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=0, atol=1e-12)


def reference(
    decoder: Decoder, prompt: list[int], image: Tensor, beams: int, most: int, alpha: float
) -> tuple[list[int], float]:
    """Beam search of one image without cache or batch, on lists."""
    live, done = [([], 0.0)], []
    for length in range(1, most + 1):
        grown = []
        for text, total in live:
            with torch.no_grad():
                log_probs = decoder(torch.tensor([prompt + text]), image[None])[0, -1].log_softmax(-1)
            grown += [([*text, token], total + float(value)) for token, value in enumerate(log_probs)]
        grown.sort(key=lambda pair: -pair[1])
        if length == most:
            done += grown[:beams]
            break
        done += [pair for pair in grown[:beams] if pair[0][-1] == EOS]
        live = [pair for pair in grown if pair[0][-1] != EOS][:beams]
        if len(done) >= beams:
            break
    return max(done, key=lambda pair: pair[1] / ((5 + len(pair[0])) / 6) ** alpha)


@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beam_search_in_a_batch_with_a_cache_is_that_of_one_image_without(beams: int, length_penalty: float) -> None:
    decoder = made(seed=2)
    prompts, memory = given(12, seed=5)
    found = beam(decoder, prompts, memory, eos=EOS, pad=PAD, max_tokens=6, beams=beams, length_penalty=length_penalty)
    differs = 0
    for row, prompt in enumerate(prompts):
        text, total = reference(decoder, prompt, memory[row], beams, 6, length_penalty)
        assert said(found, row) == text
        assert float(found.log_probs[row]) == pytest.approx(total, abs=1e-12)
        differs += text != uncached(decoder, prompt, memory[row], 6)
    assert differs


def test_more_beams_find_likelier_texts() -> None:
    """Not for every image: beams are pruned before their end is known."""
    decoder = made(spread=0.7)
    prompts, memory = given(60)
    options = {"eos": EOS, "pad": PAD, "max_tokens": 6}
    one = greedy(decoder, prompts, memory, **options).log_probs
    four = beam(decoder, prompts, memory, beams=4, **options).log_probs
    assert (four >= one - 1e-12).double().mean() > 0.9
    assert four.mean() > one.mean() + 0.05


def test_it_stops_at_the_decoders_length_and_says_what_does_not_fit() -> None:
    decoder = made()
    nn.init.constant_(decoder.head.bias[EOS : EOS + 1], -1e9)
    prompts, memory = [[2] * 12, [3]], given(2)[1]
    found = greedy(decoder, prompts, memory, eos=EOS, pad=PAD, max_tokens=9)
    assert found.tokens.shape == (2, 9) and (found.tokens != EOS).all()
    assert beam(decoder, prompts, memory, eos=EOS, pad=PAD, max_tokens=9, beams=2).tokens.shape == (2, 9)
    with pytest.raises(ValueError, match="Prompts of 1 to 12 tokens and 10 more do not fit the decoder's 20"):
        greedy(decoder, prompts, memory, eos=EOS, pad=PAD, max_tokens=10)
    with pytest.raises(ValueError, match="Prompts of 0 to 0 tokens"):
        greedy(decoder, [[]], memory[:1], eos=EOS, pad=PAD, max_tokens=2)
    with pytest.raises(ValueError, match="beams=0 must be at least 1"):
        beam(decoder, prompts, memory, eos=EOS, pad=PAD, max_tokens=2, beams=0)
