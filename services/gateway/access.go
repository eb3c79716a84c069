package gateway

import (
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/labstack/echo/v4"
	"github.com/labstack/echo/v4/middleware"

	"trireme.dev/services/gateway/openai"
)

// With Config.Keys, who has none of them is let see how the gateway is and nothing else; with Config.Origins, pages of these in browsers
// may ask and read answers. Browsers ask first whether they may (a preflight), without a key, so that is answered before keys are
// looked at; and refusals for want of a key say whose pages may read them.

// openPaths need no key: probes and Prometheus have none, and there is nothing of clients there. What is added to the API later needs
// one unless it is named here.
var openPaths = []string{"/health", "/live", "/metrics"}

// goodKey is a key that survives a header, an environment variable and a list with commas.
var goodKey = regexp.MustCompile(`^[!-+\--\[\]-~]+$`) // visible ASCII but , and \

// CheckAccess reports keys and origins that cannot be used. It shows no key.
func CheckAccess(keys, origins []string) error {
	var errs []error
	for i, key := range keys {
		if !goodKey.MatchString(key) {
			errs = append(errs, fmt.Errorf("API key number %d is empty, or has what no key may have: they are made of letters, digits and signs of ASCII, without "+
				"comma and backslash; leave the setting out where everybody may ask", i+1))
		}
	}
	for _, o := range origins {
		if want := origin(o); want == "" {
			errs = append(errs, fmt.Errorf("origin %q is none like https://app.example.com, http://localhost:3000, https://*.example.com, or * for all", o))
		} else if want != o {
			errs = append(errs, fmt.Errorf("origin %q is never what a browser sends, which is %s", o, want))
		}
	}
	return errors.Join(errs...)
}

// origin is an origin as browsers write it, with * for all, or for all that a host's name may begin with; "": it is none.
func origin(o string) string {
	if o == "*" {
		return o
	}
	u, err := url.Parse(o)
	if err != nil || u.Scheme == "" || u.Hostname() == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return ""
	}
	host := strings.TrimSuffix(strings.ToLower(u.Host), ":")
	name := strings.TrimPrefix(host, "*.")
	if name == "" || strings.ContainsAny(name, "*?") || strings.ContainsFunc(name, func(r rune) bool { return r >= utf8.RuneSelf }) { // browsers send xn--
		return ""
	}
	if port, usual := u.Port(), map[string]string{"http": "80", "https": "443"}; port == usual[u.Scheme] {
		host = strings.TrimSuffix(host, ":"+port)
	}
	return u.Scheme + "://" + host
}

// cors lets pages of origins ask. What they may send the browser asks for by name: clients of OpenAI add headers of their own.
func cors(origins []string) echo.MiddlewareFunc {
	return middleware.CORSWithConfig(middleware.CORSConfig{
		AllowOrigins: origins, ExposeHeaders: []string{echo.HeaderXRequestID, "Retry-After"}, MaxAge: 600,
	})
}

// keyed refuses requests that have none of the keys, before anything else is done for them.
func keyed(keys []string) echo.MiddlewareFunc {
	digests := make([][sha256.Size]byte, len(keys)) // alike in length, so that the time tells nothing of that either
	for i, key := range keys {
		digests[i] = sha256.Sum256([]byte(key))
	}
	return middleware.KeyAuthWithConfig(middleware.KeyAuthConfig{
		Skipper: func(c echo.Context) bool { return slices.Contains(openPaths, c.Path()) },
		Validator: func(key string, _ echo.Context) (bool, error) {
			given, found := sha256.Sum256([]byte(key)), 0
			for i := range digests {
				found |= subtle.ConstantTimeCompare(given[:], digests[i][:])
			}
			return found == 1, nil
		},
		ErrorHandler: func(err error, c echo.Context) error {
			challenge, e := `Bearer realm="trireme"`, openai.NoKey()
			if !errors.As(err, new(*middleware.ErrKeyAuthMissing)) {
				challenge, e = challenge+`, error="invalid_token"`, openai.WrongKey()
			}
			c.Response().Header().Set(echo.HeaderWWWAuthenticate, challenge)
			return e
		},
	})
}
