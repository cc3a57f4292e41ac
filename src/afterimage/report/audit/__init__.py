"""Report of an audit: verdict, page, figures."""
