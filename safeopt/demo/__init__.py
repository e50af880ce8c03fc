"""The demonstration: pinned public assets, data splits and one run that anyone can repeat."""
