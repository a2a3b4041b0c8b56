// An OpenID provider on a free port of this machine, for tests: people are in the file that its first argument names.
//
// provider.mjs PEOPLE CERTIFICATE KEY: people are read anew for each login, as {"id": {"claim": value}}. The first line
// on stdout is the issuer. It ends with its stdin.
import { readFileSync } from 'node:fs';
import { createServer } from 'node:https';
import { Provider } from 'oidc-provider';

const [people, cert, key] = process.argv.slice(2);
const server = createServer({ cert: readFileSync(cert), key: readFileSync(key) });
server.listen(0, '127.0.0.1', () => {
  const issuer = `https://localhost:${server.address().port}`;
  const provider = new Provider(issuer, {
    clients: [
      {
        client_id: 'river',
        client_secret: 'a-secret-of-the-tests',
        redirect_uris: ['https://river.localhost/login/oidc/back'],
        post_logout_redirect_uris: ['https://river.localhost/login'],
      },
      {
        client_id: 'public-river',
        token_endpoint_auth_method: 'none',
        redirect_uris: ['https://river.localhost/login/oidc/back'],
      },
    ],
    claims: {
      openid: ['sub'],
      profile: ['preferred_username', 'name'],
      email: ['email', 'email_verified'],
      groups: ['groups'],
    },
    scopes: ['openid', 'profile', 'email', 'groups'],
    cookies: { keys: ['of the tests'] },
    findAccount: (_ctx, id) => {
      const found = JSON.parse(readFileSync(people, 'utf8'))[id];
      return found && { accountId: id, claims: () => ({ sub: id, ...found }) };
    },
    ttl: { AccessToken: 60, AuthorizationCode: 60, Grant: 600, IdToken: 60, Interaction: 600, Session: 600 },
  });
  // A host of a test has whatever port was free; else its addresses are compared to the letter, as everywhere.
  const withoutPort = (uri) => uri.replace(/^(https:\/\/river\.localhost):\d+\//, '$1/');
  for (const name of ['redirectUriAllowed', 'postLogoutRedirectUriAllowed']) {
    const allowed = provider.Client.prototype[name];
    provider.Client.prototype[name] = function (uri) {
      return allowed.call(this, withoutPort(uri));
    };
  }
  server.on('request', provider.callback());
  console.log(issuer);
});
process.stdin.on('end', () => process.exit(0)).resume();
