"""``sovit shape``."""

from __future__ import annotations

import argparse
import json

CONVENTION = "2 FLOP per multiply-add, matrix products and patch convolution only; training costs 3 x forward."


def add(commands: argparse._SubParsersAction) -> None:
    shape = commands.add_parser("shape", help="parameters and FLOPs of a shape")
    shape.add_argument("shape", help="WIDTHxDEPTHxMLP such as 1152x27x4304, or NAME[/PATCH] such as So400m/14")
    shape.add_argument("--heads", type=int, help="attention heads; a named shape brings its own")
    shape.add_argument("--head-dim", type=int, help="instead of --heads: width / head dimension")
    shape.add_argument("--patch", type=int, help="patch size in pixels; a named shape brings its own, 14 otherwise")
    shape.add_argument("--image-size", type=int, default=224, help="pixels a side (default: %(default)s)")
    shape.add_argument("--channels", type=int, default=3, help="default: %(default)s")
    shape.add_argument("--pool", default="map", help="map, avg or token (default: %(default)s)")
    shape.add_argument("--classes", type=int, default=0, help="of a classifier; 0 for none (default)")
    shape.add_argument("--json", action="store_true", help="print JSON")
    shape.set_defaults(command=_shape)


def _shape(arguments: argparse.Namespace) -> int:
    from sovit.flops import forward_flops, num_params
    from sovit.shape import NAMED, parse_shape

    name, slash, _ = arguments.shape.strip().partition("/")
    says_patch = slash or name in NAMED
    shape = parse_shape(
        arguments.shape,
        num_heads=arguments.heads,
        head_dim=arguments.head_dim,
        patch_size=14 if arguments.patch is None and not says_patch else arguments.patch,
    )
    geometry = {"channels": arguments.channels, "pool": arguments.pool, "num_classes": arguments.classes}
    params = num_params(shape, arguments.image_size, **geometry)
    flops = forward_flops(shape, arguments.image_size, **geometry)
    if arguments.json:
        content = {
            **shape.as_dict(),
            "image_size": arguments.image_size,
            **geometry,
            "num_params": sum(params.values()),
            "forward_gflops": sum(flops.values()) / 1e9,
            "params_by_group": params,
            "forward_flops_by_group": flops,
        }
        print(json.dumps(content, indent=1))
        return 0
    print(
        f"{shape}: {shape.num_heads} heads of dimension {shape.head_dim}, patch {shape.patch_size}, "
        f"{arguments.image_size} px, {arguments.channels} channels, pool {arguments.pool}\n"
    )
    print(f"{'':<24}{'parameters':>16}{'forward GFLOPs/image':>24}")
    for group in dict.fromkeys([*flops, *params]):
        if params.get(group) or flops.get(group):
            print(f"{group.replace('_', ' '):<24}{params.get(group, 0):>16,}{flops.get(group, 0) / 1e9:>24.6g}")
    print(f"{'total':<24}{sum(params.values()):>16,}{sum(flops.values()) / 1e9:>24.6g}\n")
    print(CONVENTION)
    return 0
