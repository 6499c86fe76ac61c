"""Zero-shot classification and retrieval: worked by hand, by brute force, by open_clip; equal scores are no luck."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest

from sovit.language import zeroshot
from sovit.language.vocabulary import load
from sovit.language.zeroshot import PHOTO_TEMPLATES, check_templates, class_weights, errors, predictions, recalls
from sovit.lit.text_targets import SCENE_TEMPLATES as PROMPTS

LENGTH = 16


def embedded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def captions(images, texts, seed=0):
    """Owners: every image has a text, the rest are dealt out; and texts near their image."""
    rng = np.random.default_rng(seed)
    owner = torch.from_numpy(rng.permutation(np.r_[np.arange(images), rng.integers(images, size=texts - images)]))
    pictures = embedded(images, 8, seed=seed)
    return pictures, pictures[owner] + 1.5 * embedded(texts, 8, seed=seed + 1), owner


def test_three_images_worked_by_hand():
    """Angles of images 0, 90, 180 degrees; classes at 10, 60, 100: image 2 is nearest to class 2, image 1 to it too."""

    def at(*degrees):
        radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
        return torch.stack([radians.cos(), radians.sin()], 1)

    images, weights = 3 * at(0, 90, 180), at(10, 60, 100)  # lengths of embeddings do not count
    assert predictions(images, weights).tolist() == [0, 2, 2]
    found = errors(images, weights, torch.tensor([0, 1, 2]), ks=(1, 2))
    assert found[1].value == pytest.approx(1 / 3) and found[2].value == 0
    assert (found[1].num, found[1].chance) == (3, pytest.approx(2 / 3))
    assert found[2].chance == pytest.approx(1 / 3)
    # Texts at 20 and 80 degrees belong to image 0, at 95 to image 1, at 100 to image 2.
    found = recalls(images, at(20, 80, 95, 100), [0, 0, 1, 2], ks=(1, 2))
    # image 0 sees 20 first; image 1 sees 95 first; image 2 sees 100 first.
    assert found["image_to_text"][1].value == 1
    # 20 -> image 0; 80 -> image 1, then 0; 95 -> image 1; 100 -> image 1, then 2.
    assert found["text_to_image"][1].value == 0.5 and found["text_to_image"][2].value == 1
    assert found["text_to_image"][1].chance == pytest.approx(1 / 3)
    assert found["image_to_text"][2].chance == pytest.approx((1 - 1 / 6 + 1 / 2 + 1 / 2) / 3)  # 1 - C(2,2)/C(4,2)


def brute(images, texts, owner, k):
    """By sorting, in NumPy; no ties."""
    images, texts, owner = (one.double().numpy() for one in (images, texts, owner))
    scores = (images / np.linalg.norm(images, axis=1)[:, None]) @ (texts / np.linalg.norm(texts, axis=1)[:, None]).T
    first = np.argsort(-scores, axis=1)[:, :k]
    to_text = [bool(set(owner[row]) & {i}) for i, row in enumerate(first) if i in owner]
    first = np.argsort(-scores.T, axis=1)[:, :k]
    to_image = [owner[j] in row for j, row in enumerate(first)]
    return np.mean(to_text), np.mean(to_image)


@pytest.mark.parametrize("block", [None, 7, 100])
def test_recalls_are_those_of_sorting_whatever_the_blocks(block, monkeypatch):
    if block is not None:
        monkeypatch.setattr(zeroshot, "_BLOCK", block)
    images, texts, owner = captions(13, 57)
    found = recalls(images, texts, owner)
    for k in (1, 5, 10):
        to_text, to_image = brute(images, texts, owner, k)
        assert 0 < to_image < 1
        assert found["image_to_text"][k].value == pytest.approx(to_text, abs=1e-12)
        assert found["text_to_image"][k].value == pytest.approx(to_image, abs=1e-12)
    assert (found["image_to_text"][1].num, found["text_to_image"][1].num) == (13, 57)


def test_an_image_without_texts_is_found_at_most_and_never_asks():
    images, texts, owner = captions(6, 20)
    extra = torch.cat([embedded(4, 8, seed=9), images])
    found = recalls(extra, texts, owner + 4, ks=(1,))
    to_text, to_image = brute(extra, texts, owner + 4, 1)
    assert found["image_to_text"][1].num == 6
    assert (found["image_to_text"][1].value, found["text_to_image"][1].value) == pytest.approx((to_text, to_image))


@pytest.mark.parametrize(("k", "more"), [(1, 0.0), (3, 0.0), (5, 1e-8), (40, 0.0)])
def test_embeddings_that_are_all_alike_score_chance(k, more):
    """A sort would give 100 % to whoever stands first. Rounding of the embeddings does not break ties either."""
    images, texts, owner = captions(11, 38)
    images = torch.ones_like(images) + more * images
    texts = torch.ones_like(texts) + more * texts
    found = recalls(images, texts, owner, ks=(k,))
    for way in found.values():
        assert way[k].value == pytest.approx(way[k].chance, abs=1e-9)
    counts = torch.bincount(owner).tolist()
    exact = np.mean([1 - math.comb(38 - m, k) / math.comb(38, k) for m in counts]) if k < 38 else 1
    assert found["image_to_text"][k].chance == pytest.approx(exact, abs=1e-12)
    assert found["text_to_image"][k].chance == pytest.approx(min(1, k / 11))
    labels = torch.arange(11)
    share = errors(images, texts[:11], labels, ks=(min(k, 11),))[min(k, 11)]
    assert share.value == pytest.approx(1 - min(k, 11) / 11) == pytest.approx(share.chance)


def test_ties_of_right_and_wrong_count_as_all_orders_do():
    """Scores of one image's texts: 9, 5, 5, 5, 5, 1; of those that tie two are its own."""
    own = [False, True, False, True, False, True]
    scores = [9, 5, 5, 5, 5, 1]
    angles = torch.tensor(scores, dtype=torch.float64) / 10
    texts = torch.stack([angles, (1 - angles**2).sqrt()], 1)
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    owner = torch.tensor([0 if mine else 1 for mine in own])
    for k in range(1, 7):
        orders = [
            any(own[i] for i in sorted(range(6), key=lambda i: (-scores[i], order[i]))[:k])
            for order in itertools.permutations(range(6))
        ]
        hit = zeroshot._hits(images[:1], texts, (k,), lambda rows: (owner == 0)[None])[0]
        assert hit.item() == pytest.approx(np.mean(orders), abs=1e-12)


def test_chance_is_what_random_embeddings_score():
    """Five captions an image, drawn many times; within four standard errors."""
    owner = torch.arange(12).repeat_interleave(5)
    drawn = [
        recalls(embedded(12, 4, seed=s), embedded(60, 4, seed=1000 + s), owner, ks=(1, 5))["image_to_text"]
        for s in range(200)
    ]
    for k in (1, 5):
        values = np.array([one[k].value for one in drawn])
        assert abs(values.mean() - drawn[0][k].chance) < 4 * values.std() / np.sqrt(200)


def test_intervals_of_independent_queries_are_wilsons():
    images, weights = embedded(83, 6), embedded(9, 6, seed=1)
    labels = torch.randint(9, (83,), generator=torch.Generator().manual_seed(2))
    share = errors(images, weights, labels)[1]
    wrong = int((predictions(images, weights) != labels).sum())
    wanted = binomtest(wrong, 83).proportion_ci(0.95, method="wilson")
    assert (share.value, share.lo, share.hi) == pytest.approx((wrong / 83, wanted.low, wanted.high), abs=1e-12)
    one_each = recalls(embedded(40, 6), embedded(40, 6, seed=1), torch.arange(40))["text_to_image"][5]
    wanted = binomtest(round(one_each.value * 40), 40).proportion_ci(0.95, method="wilson")
    assert one_each.lo <= wanted.low + 1e-12 and one_each.hi >= wanted.high - 1e-12


def test_intervals_know_that_the_texts_of_an_image_are_missed_together():
    """Copies of a caption say nothing new: the interval is that of the images. Coverage of dependent hits, by drawing."""
    images, texts, owner = captions(60, 60)
    once = recalls(images, texts, owner, ks=(1,))["text_to_image"][1]
    copied = recalls(images, texts.repeat_interleave(5, 0), owner.repeat_interleave(5), ks=(1,))["text_to_image"][1]
    assert once.value == copied.value and 0.1 < once.value < 0.9
    assert (copied.lo, copied.hi) == pytest.approx((once.lo, once.hi), abs=0.01)
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        easy = rng.beta(1, 1, size=100)
        hits = torch.from_numpy((rng.random((100, 5)) < easy[:, None]).astype(float)).flatten()
        share = zeroshot._share(hits, 0.0, torch.arange(100).repeat_interleave(5))
        covered += share.lo <= 0.5 <= share.hi
    assert 0.91 <= covered / 400 <= 0.99  # Wilson over 500 texts as if independent covers 78 %


def test_all_found_leaves_an_interval_of_the_images_and_not_a_point():
    found = recalls(
        torch.eye(20), torch.eye(20).repeat_interleave(5, 0), torch.arange(20).repeat_interleave(5), ks=(1,)
    )
    share = found["text_to_image"][1]
    wanted = binomtest(20, 20).proportion_ci(0.95, method="wilson")
    assert (share.value, share.hi, share.num) == (1, 1, 100)
    assert share.lo == pytest.approx(wanted.low, abs=1e-9)


# ---------------------------------------------------------------------------------------------------- class weights


def encoder(width=12, words=None):
    """Sums of random vectors of the tokens: a stand-in for a tower."""
    table = embedded(words or load().size, width, seed=5)
    return lambda tokens: table[tokens].cumsum(1)[:, -1] ** 3


def test_a_class_is_the_normalised_mean_of_its_normalised_prompts():
    """Not the mean of the raw embeddings, whose longest would speak loudest; and whatever the batches."""
    vocabulary, classes, encode = load(), ["a small thing", "wug", "zebra crossing"], encoder()
    found = class_weights(encode, vocabulary, classes, PROMPTS, LENGTH)
    for name, row in zip(classes, found, strict=True):
        each = [encode(vocabulary.batch([text.replace("{}", name)], LENGTH)[0])[0] for text in PROMPTS]
        mean = torch.stack([one / one.norm() for one in each]).mean(0)
        torch.testing.assert_close(row, mean / mean.norm())
        raw = torch.stack(each).mean(0)
        assert (row - raw / raw.norm()).abs().max() > 1e-3
    torch.testing.assert_close(class_weights(encode, vocabulary, classes, PROMPTS, LENGTH, batch_size=1), found)


def test_open_clip_builds_the_same_classifier():
    open_clip = pytest.importorskip("open_clip")
    vocabulary = load()
    torch.manual_seed(0)
    config = {
        "embed_dim": 8,
        "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 16, "image_size": 16},
    }
    text = {"context_length": LENGTH, "vocab_size": vocabulary.size, "width": 16, "heads": 2, "layers": 2}
    model = open_clip.model.CLIP(**config, text_cfg=text | {"pool_type": "eos", "eos_id": vocabulary.eos}).eval()
    classes = ["goldfish", "great white shark", "hammer{head}", "stingray"]
    theirs = open_clip.build_zero_shot_classifier(
        model,
        lambda texts: vocabulary.batch(texts, LENGTH)[0],
        classes,
        [lambda name, template=template: template.replace("{}", name) for template in PHOTO_TEMPLATES],
    )
    ours = class_weights(model.encode_text, vocabulary, classes, PHOTO_TEMPLATES, LENGTH)
    torch.testing.assert_close(ours, theirs.T, rtol=1e-5, atol=1e-6)
    images = embedded(50, 8)
    assert torch.equal(predictions(images, ours), (F.normalize(images, dim=1) @ theirs).argmax(1))


def test_underscores_of_folder_names_are_spaces_and_braces_are_just_that():
    vocabulary, encode = load(), encoder()
    one = class_weights(encode, vocabulary, ["tiger  cat", "{0.__class__}"], ("a {}",), LENGTH)
    assert torch.equal(one, class_weights(encode, vocabulary, ["tiger_cat", "{0.__class__}"], ("a {}",), LENGTH))


def test_the_shipped_templates_are_templates():
    for templates in (PHOTO_TEMPLATES, PROMPTS):
        check_templates(templates)
        assert len(set(templates)) == len(templates)


def test_bad_input_is_one_sentence():
    vocabulary, encode = load(), encoder()
    for classes, templates, words in (
        ([], ("a {}",), "There is no class"),
        (["cat", " _ "], ("a {}",), "' _ ' is no class name"),
        (["cat"], (), "There is no template"),
        (["cat"], ("a photo of a {}.", "a photo"), "'a photo' has 0 places"),
        (["cat"], ("{} and {}",), "has 2 places"),
    ):
        with pytest.raises(ValueError, match=words):
            class_weights(encode, vocabulary, classes, templates, LENGTH)
    with pytest.raises(ValueError, match="class names hold 1 of 1 rows that are not finite"):
        class_weights(lambda tokens: encode(tokens) * torch.nan, vocabulary, ["cat"], ("a {}",), LENGTH)
    images, texts, owner = captions(4, 9)
    broken = images.clone()
    broken[2] = torch.inf
    for arguments, words in (
        ((images, texts, owner[:-1]), "9 rows need as many whole numbers"),
        ((images, texts, owner.double()), "whole numbers"),
        ((images, texts, owner + 1), "The owners go from 1 to 4, but there are 4"),
        ((images, texts[:, :3], owner), r"images \[4, 8\] and the texts \[9, 3\]"),
        ((images[:0], texts, owner), "one at least of each"),
        ((broken, texts, owner), "images hold 1 of 4 rows that are not finite"),
        ((images, texts, owner, (0,)), "k=0 is below 1"),
    ):
        with pytest.raises(ValueError, match=words):
            recalls(*arguments)
    with pytest.raises(ValueError, match="The labels go from -1 to 0"):
        errors(images, texts, torch.tensor([0, 0, 0, -1]))
