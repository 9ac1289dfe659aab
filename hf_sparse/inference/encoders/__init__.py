"""Whole encoders in one native call."""
