"""Calls: how they are sent, received, admitted and answered, and how each ends."""
