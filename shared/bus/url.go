package bus

import (
	"net/url"
	"strings"
)

// Redacted is the URL of a NATS server, or those of several with commas between, as logs and errors may have it: without user, password
// or token.
func Redacted(urls string) string {
	parts := strings.Split(urls, ",")
	for i, part := range parts {
		u, err := url.Parse(strings.TrimSpace(part))
		switch {
		case err == nil && u.User != nil:
			u.User = url.User("xxxxx")
			parts[i] = u.String()
		case err != nil && strings.Contains(part, "@"): // which is the password cannot be known
			parts[i] = "xxxxx" + part[strings.LastIndex(part, "@"):]
		}
	}
	return strings.Join(parts, ",")
}
