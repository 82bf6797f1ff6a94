"""Checkpoints of a run: complete or not there, and readable on another grid."""

from megadpo.checkpoint.folder import Saved, checkpoints, latest
from megadpo.checkpoint.tensors import load, save

__all__ = ["Saved", "checkpoints", "latest", "load", "save"]
