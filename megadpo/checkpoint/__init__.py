"""Checkpoints of a run: complete or not there, and readable on another grid."""

from megadpo.checkpoint.folder import Saved, checkpoints, damage, latest
from megadpo.checkpoint.tensors import METADATA, Saving, load, load_weights, resume, save

__all__ = ["METADATA", "Saved", "Saving", "checkpoints", "damage", "latest", "load", "load_weights", "resume", "save"]
