"""Packages that third parties could have written: tests install them, and collect nothing here."""

collect_ignore_glob = ["*"]
