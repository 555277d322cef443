"""Sends many concurrent requests to `consumer_service`, and checks every reply."""
