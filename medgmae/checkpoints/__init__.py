"""The border: from a name to verified files, from any code base's weights to ours, into a model and out again."""
