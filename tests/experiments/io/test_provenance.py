from retro_jax.experiments.io import provenance


def test_code_that_is_not_installed_loses_no_result(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("retro-jax-elsewhere", "jax"))
    versions = provenance.provenance()["versions"]
    assert versions["retro-jax-elsewhere"] is None and versions["jax"]
