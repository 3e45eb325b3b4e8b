"""One file per task family, found by name. A file whose name starts with an underscore is shared by families."""
