package benchcmd

import (
	"encoding/json"
	"log/slog"

	"trireme.dev/shared/bus/embedded"
)

// natsAt is where the hidden command serves NATS, as JSON on its output.
type natsAt struct{ URL, Monitor string }

// NATS is the hidden `trireme bench nats`: a server of its own process for Control.
type NATS struct {
	Data string `required:"" help:"Folder of JetStream's files." type:"path"`
}

// Run serves until the context ends.
func (c *NATS) Run(e Env, log *slog.Logger) error {
	s, err := embedded.Start(embedded.Options{StoreDir: c.Data, Log: log})
	if err != nil {
		return err
	}
	defer s.Shutdown()
	if err := json.NewEncoder(e.Out).Encode(natsAt{s.URL(), s.MonitorURL()}); err != nil {
		return err
	}
	<-e.Context.Done()
	return nil
}
