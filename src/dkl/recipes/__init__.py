"""Shipped recipes as package data: complete YAML files, read through ``dkl.config``."""
