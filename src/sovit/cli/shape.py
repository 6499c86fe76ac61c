"""``sovit shape``."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from sovit.cli.options import positive

if TYPE_CHECKING:
    from sovit.memory import Model

CONVENTION = "2 FLOP per multiply-add, matrix products and patch convolution only; training costs 3 x forward."
RECIPES = {"vit": "biases and LayerNorms", "vit22b": "the changes of ViT-22B, see conf/model/vit22b.yaml"}


def add(commands: argparse._SubParsersAction) -> None:
    shape = commands.add_parser("shape", help="parameters and FLOPs of a shape")
    add_model(shape)
    shape.add_argument(
        "--family", choices=("vit", "mixer", "swin", "text"), default="vit",
        help="mixer: WIDTHxDEPTHxTOKENxMLP; swin: WIDTHxDEPTHxMLP of the first stage, depth of the third; text: "
        "WIDTHxDEPTHxMLP of a text tower (default: vit)",
    )  # fmt: skip
    shape.add_argument("--length", type=positive, help="tokens of a text; a named tower brings its own, 16 otherwise")
    shape.add_argument("--stages", type=int, help="of a Swin transformer; a named one brings its own, 4 otherwise")
    shape.add_argument("--window", type=int, help="of a Swin transformer, tokens a side; 7 unless it is named")
    shape.add_argument("--json", action="store_true", help="print JSON")
    shape.set_defaults(command=_shape)


def add_model(command: argparse.ArgumentParser) -> None:
    """The arguments that `model_of` makes a model of."""
    command.add_argument("shape", help="WIDTHxDEPTHxMLP such as 1152x27x4304, or NAME[/PATCH] such as So400m/14")
    command.add_argument("--heads", type=int, help="attention heads; a named shape brings its own")
    command.add_argument("--head-dim", type=int, help="instead of --heads: width / head dimension")
    command.add_argument("--patch", type=int, help="patch size in pixels; a named shape brings its own, 14 otherwise")
    command.add_argument("--image-size", type=int, default=224, help="pixels a side (default: %(default)s)")
    command.add_argument("--channels", type=int, default=3, help="default: %(default)s")
    command.add_argument(
        "--pool",
        help="map, avg or token (default: map; avg for families without the others); of texts last, map or avg",
    )
    command.add_argument("--classes", type=int, default=0, help="of a classifier; 0 for none (default)")
    command.add_argument(
        "--recipe",
        choices=list(RECIPES),
        help="; ".join(f"{name}: {what}" for name, what in RECIPES.items()) + " (default: vit, but vit22b for 22B)",
    )


def model_of(arguments: argparse.Namespace) -> Model:
    """The model that the arguments describe. Raises ValueError if there is none."""
    from sovit.flops import VIT22B
    from sovit.memory import Model
    from sovit.shape import NAMED, parse_shape

    name, slash, _ = arguments.shape.strip().partition("/")
    says_patch = slash or name in NAMED
    shape = parse_shape(
        arguments.shape,
        num_heads=arguments.heads,
        head_dim=arguments.head_dim,
        patch_size=14 if arguments.patch is None and not says_patch else arguments.patch,
    )
    recipe = arguments.recipe or ("vit22b" if name == "22B" else "vit")
    return Model(
        shape,
        arguments.image_size,
        channels=arguments.channels,
        pool=arguments.pool or "map",
        num_classes=arguments.classes,
        **(VIT22B if recipe == "vit22b" else {}),  # type: ignore[arg-type]
    )


def _shape(arguments: argparse.Namespace) -> int:
    from sovit.flops import forward_flops, num_params

    if arguments.family != "vit":
        return _of_family(arguments)
    for option, family in {"stages": "swin", "window": "swin", "length": "text"}.items():
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option} is for --family {family}; a ViT has none.")
    model = model_of(arguments)
    shape = model.shape
    geometry = {"channels": model.channels, "pool": model.pool, "num_classes": model.num_classes}
    params = num_params(**vars(model))
    flops = forward_flops(shape, model.image_size, **geometry)  # type: ignore[arg-type]
    options = {"block": model.block, "qk_norm": model.qk_norm, "qkv_bias": model.qkv_bias, "norm": model.norm}
    if arguments.json:
        about = {**shape.as_dict(), "image_size": arguments.image_size, **geometry, **options}
        _print_json(about, params, flops)
        return 0
    print(
        f"{shape}: {shape.num_heads} heads of dimension {shape.head_dim}, patch {shape.patch_size}, "
        f"{arguments.image_size} px, {arguments.channels} channels, pool {model.pool}"
    )
    print(f"{_words(model)}\n")
    _print_groups(params, flops)
    return 0


def _of_family(arguments: argparse.Namespace) -> int:
    """Parameters and FLOPs of a shape of another family than ViT."""
    from sovit.families import FAMILIES, TEXT
    from sovit.flops import forward_flops, num_params

    family = FAMILIES[arguments.family]
    if arguments.recipe:
        raise ValueError(f"--recipe is for ViTs; leave it out with --family {family.name}.")
    options = {"num_heads": "heads", "head_dim": "head_dim", "stages": "stages", "window": "window"}
    for key, option in options.items():
        if key not in family.arguments and getattr(arguments, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} has no meaning for --family {family.name}; leave it out.")
    if arguments.heads is not None and arguments.head_dim is not None:
        raise ValueError("--heads and --head-dim: give one of the two.")
    if family.name == TEXT:
        return _of_texts(arguments)
    if arguments.length is not None:
        raise ValueError(f"--length is for --family {TEXT}; leave it out with --family {family.name}.")
    name, slash, _ = arguments.shape.strip().partition("/")
    usual = {} if name in family.named else {"stages": 4, "window": 7, "patch_size": None if slash else 16}
    given = {"num_heads": arguments.heads, "stages": arguments.stages, "window": arguments.window}
    given["patch_size"] = arguments.patch
    given = {key: usual.get(key) if value is None else value for key, value in given.items()}
    shape = family.make(arguments.shape, head_dim=arguments.head_dim, **given)
    place = {"channels": arguments.channels, "num_classes": arguments.classes}
    pool = arguments.pool or "avg"
    flops = forward_flops(shape, arguments.image_size, pool=pool, **place)
    params = num_params(shape, arguments.image_size, pool=pool, **place)
    if arguments.json:
        about = {**shape.as_dict(), "image_size": arguments.image_size, **place, "pool": pool}
        _print_json(about, params, flops)
        return 0
    own = ", ".join(f"{key} {value}" for key, value in shape.as_dict().items() if key not in ("family", "patch_size"))
    print(
        f"{family.title} {shape}: {own}, patch {shape.patch_size}, {arguments.image_size} px, "
        f"{arguments.channels} channels, pool {pool}\n"
    )
    _print_groups(params, flops)
    return 0


def _of_texts(arguments: argparse.Namespace) -> int:
    """Parameters and FLOPs of a text tower, as far as its shape tells."""
    from sovit.families import FAMILIES, TEXT
    from sovit.flops import forward_flops, num_params

    family = FAMILIES[TEXT]
    for option in ("patch", "classes"):
        if getattr(arguments, option):
            raise ValueError(f"--{option} has no meaning for --family {TEXT}; leave it out.")
    length = 16 if arguments.length is None and arguments.shape.strip() not in family.named else arguments.length
    shape = family.make(arguments.shape, head_dim=arguments.head_dim, num_heads=arguments.heads, length=length)
    pool = arguments.pool or "last"
    flops, params = forward_flops(shape, 1, pool=pool), num_params(shape, 1)  # of an image's size nothing is read
    if arguments.json:
        _print_json({**shape.as_dict(), "pool": pool}, params, flops)
        return 0
    own = ", ".join(f"{key} {value}" for key, value in shape.as_dict().items() if key != "family")
    print(f"{family.title} {shape}: {own}, pool {pool}\n")
    _print_groups(params, flops, "text")
    print("Not among the parameters: the table of words, a pooling head, the projection, scale and bias of the loss.")
    return 0


def _print_json(about: dict[str, Any], params: dict[str, int], flops: dict[str, int]) -> None:
    sums = {"num_params": sum(params.values()), "forward_gflops": sum(flops.values()) / 1e9}
    print(json.dumps({**about, **sums, "params_by_group": params, "forward_flops_by_group": flops}, indent=1))


def _print_groups(params: dict[str, int], flops: dict[str, int], of: str = "image") -> None:
    print(f"{'':<24}{'parameters':>16}{f'forward GFLOPs/{of}':>24}")
    for group in dict.fromkeys([*flops, *params]):
        if params.get(group) or flops.get(group):
            print(f"{group.replace('_', ' '):<24}{params.get(group, 0):>16,}{flops.get(group, 0) / 1e9:>24.6g}")
    print(f"{'total':<24}{sum(params.values()):>16,}{sum(flops.values()) / 1e9:>24.6g}\n")
    print(CONVENTION)


def _words(model: Model) -> str:
    if model.block == "serial":
        return "attention, then MLP; biases and LayerNorms (--recipe vit)"
    return "attention and MLP in parallel; queries and keys normed; no biases in QKV; RMSNorms (--recipe vit22b)"
