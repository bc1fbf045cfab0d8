"""Build reports and verdicts as text and JSON."""
