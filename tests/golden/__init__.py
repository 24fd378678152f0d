"""Values and files of an earlier version, which later ones must give and read again; see :mod:`tests.test_golden`."""
