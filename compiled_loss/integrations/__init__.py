"""Our losses in trainers that people have, a file or package a framework; none is imported before it is used."""
