package main

import (
	"fmt"
	"strings"

	"trireme.dev/services/gateway"
)

// keysVariable has the API's keys, with commas between: arguments can be read by everybody on the machine, the environment of a process by
// its owner.
const keysVariable = "TRIREME_API_KEY"

// accessFlags say who may use the API; up hands them to the gateway.
type accessFlags struct {
	APIKey        []string `name:"api-key" help:"Key of which clients have to send one, as Authorization: Bearer KEY; may be repeated. None by default: then everybody may ask. Better in the environment, with commas between, or in a file of settings: arguments can be read by everybody on the machine. /health, /live and /metrics need none." placeholder:"KEY" sep:"none"`
	AllowedOrigin []string `help:"Origin of pages that may use the API from browsers (CORS), as https://app.example.com, https://*.example.com or * for all; may be repeated. None by default." placeholder:"ORIGIN"`
}

// keys are all that the flag says: an empty one is an error, as nobody means to let everybody in by a variable that was not set.
func (f *accessFlags) keys() (keys []string) {
	for _, some := range f.APIKey {
		keys = append(keys, strings.Split(some, ",")...)
	}
	return keys
}

// check refuses what a gateway would refuse.
func (f *accessFlags) check() error {
	if err := gateway.CheckAccess(f.keys(), f.AllowedOrigin); err != nil {
		return fmt.Errorf("%w--api-key, --allowed-origin: %w", errUsage, err)
	}
	return nil
}

// args are those of the flags that a command line may have, for the gateway's; environ has the others, if there are any.
func (f *accessFlags) args() (args []string) {
	for _, o := range f.AllowedOrigin {
		args = append(args, "--allowed-origin", o)
	}
	return args
}

// environ is what the gateway's process gets besides.
func (f *accessFlags) environ() []string {
	if len(f.APIKey) == 0 {
		return nil
	}
	return []string{keysVariable + "=" + strings.Join(f.keys(), ",")}
}

// gatewayFlags say where a gateway is, and how to be let in.
type gatewayFlags struct {
	URL    string `name:"url" help:"Gateway." default:"http://127.0.0.1:8080"`
	APIKey string `name:"api-key" help:"API key, if the gateway wants one; of several with commas between the first. Better in the environment." env:"TRIREME_API_KEY,OPENAI_API_KEY" placeholder:"KEY"`
}

// key is what to send; "": nothing.
func (f *gatewayFlags) key() string {
	first, _, _ := strings.Cut(f.APIKey, ",")
	return first
}
