"""Memory and time of a run on a grid that is not here."""
