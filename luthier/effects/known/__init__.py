"""The effects. A file's name is the effect's name; one that starts with an underscore is shared by effects and is none itself."""
