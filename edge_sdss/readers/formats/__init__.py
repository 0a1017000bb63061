"""One file for each format of dialogues. A file's name is the format's key; a new file is a new format."""
