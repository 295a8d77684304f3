"""What the user wants: the grammar of a policy file, and the file read."""
