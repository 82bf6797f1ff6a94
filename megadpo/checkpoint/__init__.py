"""Checkpoints of a run: complete or not there, and readable on another grid."""

from megadpo.checkpoint.folder import Saved, checkpoints, damage, latest
from megadpo.checkpoint.loading import load, load_weights, resume
from megadpo.checkpoint.plan import METADATA
from megadpo.checkpoint.saving import Saving, save

__all__ = ["METADATA", "Saved", "Saving", "checkpoints", "damage", "latest", "load", "load_weights", "resume", "save"]
