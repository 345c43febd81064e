"""Integrations into trainers, one file or package per framework; none is imported before it is used."""
