"""Proof that the scorers equal the official packages on the same weights; see `nox -s parity`."""
