// Shows the OpenAPI document. "Authorize" takes an API key, which stays in this tab.
const place = document.getElementById("docs");
SwaggerUIBundle({ url: place.dataset.url, domNode: place, deepLinking: true, showExtensions: true });
