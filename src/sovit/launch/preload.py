"""Imported once by the fork server, so that every cell starts with warm modules, compiled kernels and category tables.

A fresh process spends seconds on these imports; a fork of this one spends hundredths of a second. Nothing here may
start a thread: a fork copies memory but no threads, and a child would wait for them forever. Hence one thread for
OpenMP before anything is loaded; a cell raises the number itself (trainer.num_threads).

What is imported here is then out of the garbage collector's sight. Otherwise a full collection in a cell walks through
all of it and so copies the pages that the fork shares with the server: .4 s, in the middle of an evaluation.
"""

# ruff: noqa: F401
import contextlib
import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"

import hydra
import sklearn.datasets
import timm

import sovit.launch.local.runner
import sovit.lit.engine
from sovit.data.fractals import FractalWorld, render

with contextlib.suppress(ImportError):
    import wandb

# The tables of the default world; a cell with another one makes its own.
render(FractalWorld(), [0], "train")
render(FractalWorld(), [0], "heldout")

gc.collect()
gc.freeze()
