"""Task runners: one module a task, grouped in one package a suite."""
