package bus

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
)

// Redacted is the URL of a NATS server, or those of several with commas between, as logs and errors may have it: without user, password
// or token. It need not be one that can be read.
func Redacted(urls string) string {
	parts := strings.Split(urls, ",")
	for i, part := range parts {
		rest := strings.TrimSpace(part)
		scheme := strings.Index(rest, "://")
		if scheme = max(0, scheme); scheme > 0 {
			scheme += len("://")
		}
		if at := strings.LastIndexByte(rest, '@'); at >= scheme {
			parts[i] = rest[:scheme] + "xxxxx" + rest[at:]
		}
	}
	return strings.Join(parts, ",")
}

// errSecret stands for what is wrong with a URL that has a password, or is wrong because of that: an error about it would have some of it.
var errSecret = errors.New("it cannot be read; in a user and password write % as %25, / as %2F, # as %23, ? as %3F, : as %3A and @ as %40")

// ConnectError is what an error of connecting to NATS may say: where, and why, but no password.
func ConnectError(urls string, err error) error {
	if malformed := (*url.Error)(nil); errors.As(err, &malformed) && strings.Contains(urls, "@") {
		err = errSecret
	}
	return fmt.Errorf("connecting to NATS at %s: %w", Redacted(urls), err)
}
