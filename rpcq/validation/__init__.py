"""Codecs of types, and bounds on the time and memory that validating a body may take."""
