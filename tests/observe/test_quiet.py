"""The silence of entry points: by name, and gone afterwards."""

import logging
import os
import warnings

from megadpo.observe.quiet import SWITCHES, quiet


def test_named_libraries_are_silent_and_others_are_not(recwarn, caplog):
    caplog.set_level(logging.INFO)
    with quiet():
        warnings.warn_explicit("third-party", UserWarning, "x.py", 1, module="megatron.core.optimizer")
        warnings.warn_explicit("third-party", FutureWarning, "x.py", 1, module="torch.distributed")
        warnings.warn_explicit("our own", UserWarning, "x.py", 1, module="megadpo.x")
        warnings.warn_explicit("another's", UserWarning, "x.py", 1, module="torchx")
        logging.getLogger("transformers.modeling").warning("third-party")
        logging.getLogger("megatron.core").info("third-party")
        logging.getLogger("transformers").error("an error")
        logging.getLogger("megadpo").warning("our own")
    assert [str(entry.message) for entry in recwarn] == ["our own", "another's"]
    assert [entry.getMessage() for entry in caplog.records] == ["an error", "our own"]


def test_nothing_stays_changed(monkeypatch):
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    level, filters = logging.getLogger("torch").level, list(warnings.filters)
    with quiet():
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "info", "what the user has set stays"
        assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert logging.getLogger("torch").level == level
    assert list(warnings.filters) == filters
