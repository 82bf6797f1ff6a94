"""Checkpoints of a run: complete or not there, and readable on another grid."""

from megadpo.checkpoint.folder import Saved, checkpoints, latest
from megadpo.checkpoint.tensors import METADATA, load, load_weights, save

__all__ = ["METADATA", "Saved", "checkpoints", "latest", "load", "load_weights", "save"]
