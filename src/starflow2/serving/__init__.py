"""Serving: a service around the engine, and the HTTP routes, formats and guards on top of it.

`service.Service` is what routes and pages call; `app.build_app` is the whole application.
"""

__all__: list[str] = []
