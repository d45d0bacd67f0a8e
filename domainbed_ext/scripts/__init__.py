"""The command lines: `python -m domainbed_ext.scripts.<name>`."""
