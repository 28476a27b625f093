"""The pages for browsers, and the files that they are made of."""
