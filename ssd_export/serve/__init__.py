"""Serves one warm generator over HTTP: a micro-batcher, the OpenAI Images routes, a page."""
